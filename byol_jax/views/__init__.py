"""The views of BYOL: operations on pictures, and how they are drawn."""
