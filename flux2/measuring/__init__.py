"""Samplings that are run to be measured: whole steps, recorded attention calls, warm-up."""
