"""The way in: checks requests, walks them through the stages, keeps the jobs' front desk."""
