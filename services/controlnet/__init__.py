"""The ControlNets' room: control images to residuals, handed to a U-Net replica on the same node."""
