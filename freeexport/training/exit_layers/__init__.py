"""An exit of transformer layers of its own: the layers in torch, their teacher, and how they are trained."""
