"""ComfyUI's workflows with this pack's nodes in place of core's, and back: what scripts/convert_workflow.py and the
page's command do. Standard library alone.
"""
