"""InfraFabric: the coordination fabric for swarms of agents."""

__version__ = "0.1.0"
