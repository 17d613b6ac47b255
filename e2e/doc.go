// Package e2e tests the platform from outside: real processes of the real binary,
// the real nomad command line, real HTTP. It sees what a user sees and no more.
package e2e
