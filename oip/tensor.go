// Package oip speaks the Open Inference Protocol, version 2, over REST: tensors, the JSON messages, the binary tensor
// extension, and a small client.
//
// A tensor holds its elements in one form only: raw little-endian bytes, row-major, BYTES elements each prefixed with
// their length in four bytes. That is what the binary extension carries and what ONNX Runtime reads, so a binary
// request is decoded without copying; JSON numbers are parsed straight into it.
//
// FP16 and BF16 have no JSON form: as in Triton, such tensors must travel as binary data. JSON has no NaN or infinity
// and no byte strings that are not UTF-8 either; encoding such an output as JSON is an error that says so.
//
// Decoding is bounded by the body it is given: no shape, depth or count in a message makes it allocate more than a
// small multiple of the bytes that were really sent.
//
// Source: https://github.com/kserve/open-inference-protocol and Triton's "Binary Tensor Data Extension".
package oip

import (
	"encoding/binary"
	"math"
	"math/bits"
	"strconv"
)

// Datatype is the protocol's name for an element type.
type Datatype string

// The element types that the protocol can name.
const (
	BOOL   Datatype = "BOOL" // one byte, 0 or 1
	UINT8  Datatype = "UINT8"
	UINT16 Datatype = "UINT16"
	UINT32 Datatype = "UINT32"
	UINT64 Datatype = "UINT64"
	INT8   Datatype = "INT8"
	INT16  Datatype = "INT16"
	INT32  Datatype = "INT32"
	INT64  Datatype = "INT64"
	FP16   Datatype = "FP16" // IEEE 754 half precision
	BF16   Datatype = "BF16" // the upper half of an FP32
	FP32   Datatype = "FP32"
	FP64   Datatype = "FP64"
	BYTES  Datatype = "BYTES" // byte strings of any length
)

// Limits of one message; whatever exceeds them is refused.
const (
	MaxRank    = 32      // dimensions of a tensor
	MaxTensors = 1024    // inputs, or outputs, of a message
	MaxName    = 4 << 10 // bytes of a tensor's name or of a request's id
)

// Size is the number of bytes of one element, 0 for BYTES, whose elements vary, and -1 for an unknown type.
func (d Datatype) Size() int {
	switch d {
	case BOOL, UINT8, INT8:
		return 1
	case UINT16, INT16, FP16, BF16:
		return 2
	case UINT32, INT32, FP32:
		return 4
	case UINT64, INT64, FP64:
		return 8
	case BYTES:
		return 0
	}
	return -1
}

// Tensor is one named input or output.
type Tensor struct {
	Name     string
	Datatype Datatype
	Shape    []int64 // no dimension is negative; empty for a scalar
	Data     []byte  // see the package comment; may alias the message that it was decoded from
}

// Elements is the number of elements that a shape stands for. A negative dimension, more than MaxRank dimensions and a
// product that does not fit 63 bits are errors.
func Elements(shape []int64) (int64, error) {
	if len(shape) > MaxRank {
		return 0, badf("a shape has at most %d dimensions, got %d", MaxRank, len(shape))
	}
	n, empty := uint64(1), false
	for _, d := range shape {
		if d < 0 {
			return 0, badf("shape %v: a dimension is negative", shape)
		}
		if d == 0 {
			empty = true
			continue
		}
		hi, lo := bits.Mul64(n, uint64(d))
		if hi != 0 || lo > math.MaxInt64 {
			return 0, badf("shape %v: the number of elements overflows 63 bits", shape)
		}
		n = lo
	}
	if empty {
		return 0, nil
	}
	return int64(n), nil
}

// Check says whether Data is what Datatype and Shape promise: the right number of bytes, only 0 and 1 in a BOOL, and
// length prefixes that add up in BYTES.
func (t *Tensor) Check() error {
	size := t.Datatype.Size()
	if size < 0 {
		return badf("unknown datatype %q", t.Datatype)
	}
	n, err := Elements(t.Shape)
	if err != nil {
		return err
	}
	if size == 0 {
		return t.eachBytes(n, nil)
	}
	if n > math.MaxInt64/int64(size) || n*int64(size) != int64(len(t.Data)) {
		return badf("%s of shape %v: expected %d elements of %d bytes, got %d bytes", t.Datatype, t.Shape, n, size, len(t.Data))
	}
	if t.Datatype == BOOL {
		for i, b := range t.Data {
			if b > 1 {
				return badf("a BOOL is a byte of value 0 or 1, got %d at element %d", b, i)
			}
		}
	}
	return nil
}

// eachBytes walks the elements of a BYTES tensor, which must be exactly n.
func (t *Tensor) eachBytes(n int64, visit func([]byte)) error {
	if n > int64(len(t.Data)/4) {
		return badf("BYTES of shape %v: expected %d elements, got %d bytes, too few for their lengths", t.Shape, n, len(t.Data))
	}
	rest := t.Data
	for i := range n {
		if len(rest) < 4 {
			return badf("BYTES of shape %v: expected %d elements, got %d", t.Shape, n, i)
		}
		size := uint64(binary.LittleEndian.Uint32(rest))
		if size > uint64(len(rest)-4) {
			return badf("BYTES of shape %v: element %d says %d bytes, %d are left", t.Shape, i, size, len(rest)-4)
		}
		if visit != nil {
			visit(rest[4 : 4+size])
		}
		rest = rest[4+size:]
	}
	if len(rest) > 0 {
		return badf("BYTES of shape %v: %d bytes are left over after %d elements", t.Shape, len(rest), n)
	}
	return nil
}

// ByteStrings gives the elements of a BYTES tensor; they alias Data.
func (t *Tensor) ByteStrings() ([][]byte, error) {
	if t.Datatype != BYTES {
		return nil, badf("tensor %q: expected BYTES, got %s", t.Name, t.Datatype)
	}
	n, err := Elements(t.Shape)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	err = t.eachBytes(n, func(b []byte) { out = append(out, b) })
	return out, err
}

// Floats gives the elements of a floating-point tensor (FP16, BF16, FP32, FP64); other types are an error.
func (t *Tensor) Floats() ([]float64, error) {
	var at func(i int) float64
	le := binary.LittleEndian
	switch t.Datatype {
	case FP64:
		at = func(i int) float64 { return math.Float64frombits(le.Uint64(t.Data[8*i:])) }
	case FP32:
		at = func(i int) float64 { return float64(math.Float32frombits(le.Uint32(t.Data[4*i:]))) }
	case BF16:
		at = func(i int) float64 { return float64(math.Float32frombits(uint32(le.Uint16(t.Data[2*i:])) << 16)) }
	case FP16:
		at = func(i int) float64 { return half(le.Uint16(t.Data[2*i:])) }
	default:
		return nil, badf("tensor %q: expected floating-point numbers, got %s", t.Name, t.Datatype)
	}
	if err := t.Check(); err != nil {
		return nil, err
	}
	out := make([]float64, len(t.Data)/t.Datatype.Size())
	for i := range out {
		out[i] = at(i)
	}
	return out, nil
}

// half is the value of an IEEE 754 half-precision number.
func half(h uint16) float64 {
	sign, exp, frac := 1.0, int(h>>10&31), float64(h&1023)
	if h>>15 == 1 {
		sign = -1
	}
	switch {
	case exp == 31 && frac != 0:
		return math.NaN()
	case exp == 31:
		return math.Inf(int(sign))
	case exp == 0:
		return sign * math.Ldexp(frac, -24)
	}
	return sign * math.Ldexp(1024+frac, exp-25)
}

// FromFloat32 makes an FP32 tensor.
func FromFloat32(name string, shape []int64, values []float32) Tensor {
	data := make([]byte, 0, 4*len(values))
	for _, v := range values {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(v))
	}
	return Tensor{Name: name, Datatype: FP32, Shape: shape, Data: data}
}

// FromStrings makes a BYTES tensor.
func FromStrings(name string, shape []int64, values ...string) Tensor {
	var data []byte
	for _, v := range values {
		data = append(binary.LittleEndian.AppendUint32(data, uint32(len(v))), v...)
	}
	return Tensor{Name: name, Datatype: BYTES, Shape: shape, Data: data}
}

func quote(name string) string { return strconv.Quote(clip(name, 128)) }

// clip shortens what a stranger sent before it goes into a message.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
