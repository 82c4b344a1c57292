"""Networks for dense prediction: a timm network that gives maps, a pyramid of them, and heads for segmentation and
detection. Nothing is imported before `create_backbone(..., head=...)` asks for it."""
