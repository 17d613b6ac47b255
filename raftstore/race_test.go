//go:build race

package raftstore

// checkptr says that this build ends at once where bbolt follows a damaged file out of its page: the race detector brings
// such checks along, and nothing can recover from them. The product gets a fault there, which guard turns into an error.
const checkptr = true
