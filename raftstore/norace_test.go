//go:build !race

package raftstore

const checkptr = false
