//! One file a command. Prints data on stdout and talk on stderr; leaves every decision to the rooms.
