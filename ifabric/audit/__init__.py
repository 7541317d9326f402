"""The record of every command: made, kept until the stream has it, and examined."""
