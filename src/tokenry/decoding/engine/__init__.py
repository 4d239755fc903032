"""The shared loop: drafts of any proposer verified in one pass of the model per step."""
