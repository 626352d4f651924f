"""Where pictures come from: random access by index, behind one small contract (base.Source)."""
