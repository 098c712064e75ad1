"""Scores of the tasks of hierarchical language bootstrapping data (HLBD): how often each level is
turned into each other one as the samples say."""
