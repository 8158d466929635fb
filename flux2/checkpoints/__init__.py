"""What a FLUX.2 file or folder is: its header, its kind, its key names, and whether it is complete. Nothing here loads
weights.
"""
