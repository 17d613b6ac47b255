//go:build simbug

package cluster

const fitChecked = false
