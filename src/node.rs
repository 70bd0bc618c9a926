//! Puts the rooms together into one running node and owns the order of start and drain; decides nothing itself.
