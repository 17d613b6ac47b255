// Package pb holds the protocol of package fleet: fleet.proto and the stubs
// that `make proto` generates from it.
package pb
