//go:build !simbug

package cluster

// fitChecked is false only in a build with the tag simbug, in which the simulator
// must find that it is.
const fitChecked = true
