"""What the methods share at run time: the layers to adapt, and the trainers. Importing it loads torch."""
