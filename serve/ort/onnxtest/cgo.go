//go:build cgo

package onnxtest

const hasCgo = true
