//go:build cgo && unix

package ort

/*
#cgo CFLAGS: -O2 -Wall
#cgo LDFLAGS: -ldl
#include <stdlib.h>
#include "ort.h"
*/
import "C"

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"unsafe"

	"github.com/rxvision/rxvision/oip"
)

// rxLog receives ONNX Runtime's log lines, on any thread.
//
//export rxLog
func rxLog(severity C.int, category, message *C.char) {
	level := slog.LevelInfo
	switch {
	case severity >= 3:
		level = slog.LevelError
	case severity == 2:
		level = slog.LevelWarn
	}
	if log := logTo.Load(); log != nil {
		log.Log(context.Background(), level, "onnxruntime", "text", oneLine(C.GoString(message)), "category", C.GoString(category))
	}
}

// loadNative loads the library, with telemetry switched off before any of its code runs.
func loadNative(path string) (version string, err error) {
	if err := os.Setenv("ORT_DISABLE_TELEMETRY", "1"); err != nil { // with cgo this reaches C's environment too
		return "", err
	}
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	var v *C.char
	if msg := C.rx_load(p, &v); msg != nil {
		defer C.free(unsafe.Pointer(msg))
		return "", errors.New(C.GoString(msg))
	}
	return C.GoString(v), nil
}

func telemetryOff() bool { return C.rx_telemetry_off() == 1 }

// statusError turns a status into an error and releases it.
func statusError(status unsafe.Pointer) error {
	if status == nil {
		return nil
	}
	var code C.int
	text := C.rx_error(status, &code)
	defer C.free(unsafe.Pointer(text))
	return &runtimeError{code: int(code), text: C.GoString(text)}
}

// native is a session of ONNX Runtime.
type native struct {
	session         unsafe.Pointer
	inputs, outputs *C.rx_port // their names serve every run
	nIn, nOut       C.size_t
}

// openNative opens a model file and reads all that the session can say of itself.
func openNative(path string, threads int) (n *native, inputs, outputs []port, properties map[string]string, err error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	n = new(native)
	if err := statusError(C.rx_open(p, C.int(threads), &n.session)); err != nil {
		return nil, nil, nil, nil, err
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if err = statusError(C.rx_ports(n.session, 0, &n.inputs, &n.nIn)); err != nil {
		return nil, nil, nil, nil, err
	}
	if err = statusError(C.rx_ports(n.session, 1, &n.outputs, &n.nOut)); err != nil {
		return nil, nil, nil, nil, err
	}
	var pairs **C.char
	var count C.size_t
	err = statusError(C.rx_metadata(n.session, &pairs, &count))
	defer C.rx_free_metadata(pairs, count)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	properties = map[string]string{}
	texts := unsafe.Slice(pairs, count)
	for i := 0; i < len(texts); i += 2 {
		properties[C.GoString(texts[i])] = C.GoString(texts[i+1])
	}
	return n, goPorts(n.inputs, n.nIn), goPorts(n.outputs, n.nOut), properties, nil
}

func goPorts(ports *C.rx_port, count C.size_t) []port {
	var out []port
	for _, p := range unsafe.Slice(ports, count) {
		g := port{name: C.GoString(p.name), kind: int(p.kind), element: int(p._type), rank: int(p.rank)}
		for i := range min(g.rank, oip.MaxRank) {
			g.shape = append(g.shape, int64(p.shape[i]))
		}
		out = append(out, g)
	}
	return out
}

func (n *native) close() {
	C.rx_close(n.session)
	C.rx_free_ports(n.inputs, n.nIn)
	C.rx_free_ports(n.outputs, n.nOut)
}

// run runs the model on inputs in the order of its ports, and returns the outputs at the given positions. When ctx ends
// first, the run is ended and its cause returned.
func (n *native) run(ctx context.Context, inputs []oip.Tensor, elements []int, outputs []int) ([]oip.Tensor, error) {
	var options unsafe.Pointer
	if err := statusError(C.rx_run_options(&options)); err != nil {
		return nil, err
	}
	defer C.rx_free_run_options(options)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		C.rx_terminate(options)
		close(ended)
	})
	defer func() {
		if !stop() {
			<-ended // options must not be released under rx_terminate
		}
	}()

	var pin runtime.Pinner
	defer pin.Unpin()
	in := make([]C.rx_tensor, len(inputs)+1)
	out := make([]C.rx_tensor, len(outputs)+1)
	inPorts, outPorts := unsafe.Slice(n.inputs, n.nIn), unsafe.Slice(n.outputs, n.nOut)
	for i := range inputs {
		t, c := &inputs[i], &in[i]
		count, err := oip.Elements(t.Shape)
		if err != nil {
			return nil, err
		}
		data := aligned(t)
		if len(data) > 0 {
			pin.Pin(&data[0])
			c.data = unsafe.Pointer(&data[0])
		}
		c.name, c._type = inPorts[i].name, C.int32_t(elements[i])
		c.size, c.count, c.rank = C.size_t(len(data)), C.size_t(count), C.int32_t(len(t.Shape))
		for j, d := range t.Shape {
			c.shape[j] = C.int64_t(d)
		}
	}
	for i, o := range outputs {
		out[i].name = outPorts[o].name
	}
	err := statusError(C.rx_run(n.session, options, &in[0], C.size_t(len(inputs)), &out[0], C.size_t(len(outputs))))
	defer C.rx_free_values(&out[0], C.size_t(len(outputs)))
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	results := make([]oip.Tensor, len(outputs))
	for i := range outputs {
		if results[i], err = result(&out[i]); err != nil {
			return nil, fmt.Errorf("output %q: %w", C.GoString(out[i].name), err)
		}
	}
	return results, nil
}

// result copies an output out of ONNX Runtime's memory.
func result(c *C.rx_tensor) (oip.Tensor, error) {
	t := oip.Tensor{Name: C.GoString(c.name), Datatype: datatypes[int(c._type)], Shape: make([]int64, c.rank)}
	if t.Datatype == "" {
		return t, fmt.Errorf("the model answered with something that is no tensor of a type that the protocol can name")
	}
	if c.rank > oip.MaxRank {
		return t, fmt.Errorf("the model answered with %d dimensions, at most %d are possible", c.rank, oip.MaxRank)
	}
	for i := range t.Shape {
		t.Shape[i] = int64(c.shape[i])
	}
	if t.Datatype != oip.BYTES {
		t.Data = make([]byte, c.size)
		copy(t.Data, unsafe.Slice((*byte)(c.data), c.size))
		return t, nil
	}
	t.Data = make([]byte, c.size+4*c.count)
	if len(t.Data) == 0 {
		return t, nil
	}
	return t, statusError(C.rx_strings(c, (*C.char)(unsafe.Pointer(&t.Data[0]))))
}

// aligned gives the tensor's data at an address that suits its elements: itself, or a copy.
func aligned(t *oip.Tensor) []byte {
	size := uintptr(t.Datatype.Size())
	if size <= 1 || len(t.Data) == 0 || uintptr(unsafe.Pointer(&t.Data[0]))%size == 0 {
		return t.Data
	}
	// An allocation of a multiple of 8 bytes is aligned to 8.
	return append(make([]byte, 0, (len(t.Data)+7)&^7), t.Data...)
}
