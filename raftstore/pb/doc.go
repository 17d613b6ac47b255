// Package pb holds the protocol between servers, peers.proto, and the stubs
// that `make proto` generates from it.
package pb
