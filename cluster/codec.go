package cluster

import (
	"fmt"
	"reflect"
	"sync"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

//go:generate cp internal/codecgen/empty.txt codec_gen.go
//go:generate go run ./internal/codecgen codec_gen.go

// msgpackHandle says what stored bytes look like. Canonical sorts map and field names, so that equal values have equal
// bytes on every replica. The generated code writes the same; what it does not know goes this way.
var msgpackHandle = func() *codec.MsgpackHandle {
	h := &codec.MsgpackHandle{WriteExt: true}
	h.Canonical = true
	h.RawToString = true
	h.MapType = reflect.TypeOf(map[string]any(nil))
	return h
}()

// scratch holds buffers to encode into.
var scratch = sync.Pool{New: func() any { b := make([]byte, 0, 4096); return &b }}

// Marshal encodes a record or command body as a msgpack map with sorted keys.
// Field names are append-only: old bytes must decode for ever.
func Marshal(v any) []byte { return marshal(nil, v) }

// marshal gives prefix and, behind it, v's stored form.
func marshal(prefix []byte, v any) []byte {
	if r, ok := v.(*atRest); ok {
		v = r.wake()
	}
	return scratched(func(b []byte) []byte {
		b, ok := appendRecord(append(b, prefix...), v)
		if !ok {
			b = append(b, marshalByReflection(v)...)
		}
		return b
	})
}

// scratched gives a copy of what is appended to an empty buffer.
func scratched(appendTo func([]byte) []byte) []byte {
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	*buf = appendTo((*buf)[:0])
	return append([]byte(nil), *buf...)
}

// AppendStored appends a record as snapshots hold it: Marshal's form, but of those of which there may be a million
// without what is zero, and of an allocation with states and metrics as they are packed. Restore reads both forms.
func AppendStored(b []byte, record any) []byte {
	switch r := record.(type) {
	case *atRest:
		return append(b, r.stored...)
	case *Allocation:
		return storeAllocation(b, r)
	case *Evaluation:
		return storeEvaluation(b, r)
	case *Deployment:
		return storeDeployment(b, r)
	}
	if b, ok := appendRecord(b, record); ok {
		return b
	}
	return append(b, marshalByReflection(record)...)
}

func marshalByReflection(v any) (out []byte) {
	if err := codec.NewEncoderBytes(&out, msgpackHandle).Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // only a type that cannot be encoded: a bug
	}
	return out
}

// Unmarshal decodes what Marshal wrote into an empty value. Unknown fields are skipped.
func Unmarshal(b []byte, v any) error { return unmarshal(b, v, nil) }

func unmarshal(b []byte, v any, shared *interner) error {
	d := decoder{left: b, shared: shared}
	return d.record(v)
}

// record reads a whole record into an empty value.
func (d *decoder) record(v any) error {
	b := d.left
	if !decodeRecord(d, v) {
		d.err = codec.NewDecoderBytes(b, msgpackHandle).Decode(v)
	} else if len(d.left) > 0 {
		d.fail("%d bytes follow the record", len(d.left))
	}
	if d.err != nil {
		return fmt.Errorf("decode %T: %w", v, d.err)
	}
	return nil
}

// Clone returns a deep copy of a record.
func Clone[T any](v *T) *T {
	if c, ok := copyRecord(v).(*T); ok {
		return c
	}
	out := new(T)
	if err := Unmarshal(Marshal(v), out); err != nil {
		panic(err) // Marshal's own output
	}
	return out
}
