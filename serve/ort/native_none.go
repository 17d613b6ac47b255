//go:build !cgo || !unix

package ort

import (
	"context"
	"errors"

	"github.com/rxvision/rxvision/oip"
)

var errNoCgo = errors.New(
	"this program was built without cgo, so it cannot load ONNX Runtime: build it with CGO_ENABLED=1 and a C compiler")

type native struct{}

func loadNative(string) (string, error) { return "", errNoCgo }

func telemetryOff() bool { return true }

func openNative(string, int) (*native, []port, []port, map[string]string, error) {
	return nil, nil, nil, nil, errNoCgo
}

func (*native) close() {}

func (*native) run(context.Context, []oip.Tensor, []int, []int) ([]oip.Tensor, error) {
	return nil, errNoCgo
}
