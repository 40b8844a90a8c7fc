"""What people look at: pictures (figures.py), the report (report.py), the hand-in (handin.py).

Called by the scripts, never calling them back. canvas.py holds what pictures and report pages share.
"""
