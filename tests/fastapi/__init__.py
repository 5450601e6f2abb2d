"""Answers of a FastAPI application to errors of the database."""
