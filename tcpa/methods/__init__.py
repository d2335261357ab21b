"""The methods besides TCPA and VPT: token prompts, prompts on the image, tunings."""
