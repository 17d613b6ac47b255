//go:build !cgo

package onnxtest

const hasCgo = false
