"""What the library costs and how well it does what it is for, measured."""
