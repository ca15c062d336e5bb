"""How each transformers architecture is built, fed and read; shared by the backbones of that architecture."""
