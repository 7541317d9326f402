"""What tests of the fabric, and of residents from elsewhere, are made of: twins of the seams, a clock to be moved by hand,
real servers on free ports. Never a default for users.
"""
