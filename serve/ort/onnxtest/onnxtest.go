// Package onnxtest writes small ONNX models for tests, and finds the ONNX Runtime library to run them with. It encodes the
// few messages of onnx.proto that it needs by hand.
package onnxtest

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Element types, numbered as in TensorProto.DataType.
const (
	Float   = 1
	Uint8   = 2
	Int8    = 3
	Uint16  = 4
	Int16   = 5
	Int32   = 6
	Int64   = 7
	String  = 8
	Bool    = 9
	Float16 = 10
	Double  = 11
	Uint32  = 12
	Uint64  = 13
	BFloat  = 16
	Float8  = 17 // FLOAT8E4M3FN
)

// Library is the path of the ONNX Runtime library; where none can be loaded the test is skipped.
func Library(tb testing.TB) string {
	tb.Helper()
	if !hasCgo {
		tb.Skip("built without cgo, so ONNX Runtime cannot be loaded: set CGO_ENABLED=1 and install a C compiler")
	}
	path := os.Getenv("RXVISION_ORT_LIBRARY")
	if path == "" {
		root, err := os.Getwd()
		if err != nil {
			tb.Fatal(err)
		}
		for !exists(filepath.Join(root, "go.mod")) && root != filepath.Dir(root) {
			root = filepath.Dir(root)
		}
		path = filepath.Join(root, "out", "lib", "libonnxruntime.so.1")
	}
	if !exists(path) {
		tb.Skipf("no ONNX Runtime at %s: run `make ort`, or set RXVISION_ORT_LIBRARY", path)
	}
	return path
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Model is an ONNX model with one graph.
type Model struct {
	IR, Opset       uint64 // 8 and 17 when 0
	Nodes           []Node
	Inputs, Outputs []Value
	Initializers    []Tensor
	Metadata        [][2]string
}

// Node is one operator.
type Node struct {
	Op, Domain      string
	Inputs, Outputs []string
	Ints            map[string]int64 // integer attributes
}

// Value is an input or output. A dimension of -1 may vary; nil dimensions leave the rank open, none at all make a scalar.
type Value struct {
	Name     string
	Elem     uint64
	Dims     []int64
	Sequence bool
}

// Tensor is a constant.
type Tensor struct {
	Name string
	Elem uint64
	Dims []int64
	Raw  []byte
}

// message is a protobuf message being written.
type message []byte

func (m *message) int(field int, v uint64) {
	*m = binary.AppendUvarint(binary.AppendUvarint(*m, uint64(field)<<3), v)
}

func (m *message) bytes(field int, b []byte) {
	*m = binary.AppendUvarint(binary.AppendUvarint(*m, uint64(field)<<3|2), uint64(len(b)))
	*m = append(*m, b...)
}

func (m *message) text(field int, s string) { m.bytes(field, []byte(s)) }

// Bytes is the model as a ModelProto.
func (m Model) Bytes() []byte {
	if m.IR == 0 {
		m.IR = 8
	}
	if m.Opset == 0 {
		m.Opset = 17
	}
	var graph, model message
	for i, n := range m.Nodes {
		graph.bytes(1, n.bytes(i))
	}
	graph.text(2, "test")
	for _, t := range m.Initializers {
		graph.bytes(5, t.bytes())
	}
	for _, v := range m.Inputs {
		graph.bytes(11, v.bytes())
	}
	for _, v := range m.Outputs {
		graph.bytes(12, v.bytes())
	}
	model.int(1, m.IR)
	model.text(2, "rxvision test")
	model.bytes(7, graph)
	domains := []string{""}
	for _, n := range m.Nodes {
		if !slices.Contains(domains, n.Domain) {
			domains = append(domains, n.Domain)
		}
	}
	for _, d := range domains {
		var opset message
		opset.text(1, d)
		opset.int(2, m.Opset)
		if d != "" {
			opset = opset[:0]
			opset.text(1, d)
			opset.int(2, 1)
		}
		model.bytes(8, opset)
	}
	for _, kv := range m.Metadata {
		var entry message
		entry.text(1, kv[0])
		entry.text(2, kv[1])
		model.bytes(14, entry)
	}
	return model
}

func (n Node) bytes(index int) []byte {
	var m message
	for _, name := range n.Inputs {
		m.text(1, name)
	}
	for _, name := range n.Outputs {
		m.text(2, name)
	}
	m.text(3, fmt.Sprintf("node%d", index))
	m.text(4, n.Op)
	for name, v := range n.Ints {
		var a message
		a.text(1, name)
		a.int(3, uint64(v))
		a.int(20, 2)
		m.bytes(5, a)
	}
	m.text(7, n.Domain)
	return m
}

func (v Value) bytes() []byte {
	var tensor, kind, m message
	tensor.int(1, v.Elem)
	if v.Dims != nil {
		var shape message
		for i, d := range v.Dims {
			var dim message
			if d < 0 {
				dim.text(2, fmt.Sprintf("%s_%d", v.Name, i))
			} else {
				dim.int(1, uint64(d))
			}
			shape.bytes(1, dim)
		}
		tensor.bytes(2, shape)
	}
	kind.bytes(1, tensor)
	if v.Sequence {
		var sequence, outer message
		sequence.bytes(1, kind)
		outer.bytes(4, sequence)
		kind = outer
	}
	m.text(1, v.Name)
	m.bytes(2, kind)
	return m
}

func (t Tensor) bytes() []byte {
	var m message
	for _, d := range t.Dims {
		m.int(1, uint64(d))
	}
	m.int(2, t.Elem)
	m.text(8, t.Name)
	m.bytes(9, t.Raw)
	return m
}

// Identity is a model that answers its input x as its output y.
func Identity(elem uint64, dims []int64, metadata ...[2]string) Model {
	return Model{
		Nodes:    []Node{{Op: "Identity", Inputs: []string{"x"}, Outputs: []string{"y"}}},
		Inputs:   []Value{{Name: "x", Elem: elem, Dims: dims}},
		Outputs:  []Value{{Name: "y", Elem: elem, Dims: dims}},
		Metadata: metadata,
	}
}

// Slow is a model of n matrix products in a row: y = x·x·x…, for square matrices x of any size.
func Slow(n int) Model {
	m := Model{
		Inputs:  []Value{{Name: "x", Elem: Float, Dims: []int64{-1, -1}}},
		Outputs: []Value{{Name: "y", Elem: Float, Dims: []int64{-1, -1}}},
	}
	last := "x"
	for i := range n {
		next := fmt.Sprintf("t%d", i)
		if i == n-1 {
			next = "y"
		}
		m.Nodes = append(m.Nodes, Node{Op: "MatMul", Inputs: []string{last, "x"}, Outputs: []string{next}})
		last = next
	}
	return m
}

// Write writes the model to a file of the test's own and gives its path.
func (m Model) Write(tb testing.TB) string { return WriteBytes(tb, m.Bytes()) }

// WriteBytes writes a file model.onnx of the test's own and gives its path.
func WriteBytes(tb testing.TB, b []byte) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "model.onnx")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}
