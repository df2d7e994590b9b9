"""What people look at: the plan and the X-ray before a run, and after it the model card, report.html and the last lines
of the log, all made of one RunRecord."""
