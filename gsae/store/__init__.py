"""What the stages keep on disk: activation stores and run directories."""
