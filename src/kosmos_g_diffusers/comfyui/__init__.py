"""Kosmos-G in ComfyUI: its nodes, and the folder that `kosmos-g comfyui install` writes into custom_nodes.

`nodes.py`, `encoder.py` and `sprites.py` import ComfyUI's own modules and are imported by that folder alone, inside ComfyUI;
`installing.py` needs none of them.
"""
