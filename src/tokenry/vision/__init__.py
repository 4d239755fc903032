"""Backbones (timm models), restoration and dense prediction. Importing this registers the models with timm."""
