"""Joining, sizing and following a Ray cluster; submitting jobs to one."""
