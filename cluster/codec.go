package cluster

import (
	"fmt"
	"reflect"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// msgpackHandle is shared; a handle is read-only once used. Canonical sorts map
// and field names, so that equal values have equal bytes on every replica.
var msgpackHandle = func() *codec.MsgpackHandle {
	h := &codec.MsgpackHandle{WriteExt: true}
	h.Canonical = true
	h.RawToString = true
	h.MapType = reflect.TypeOf(map[string]any(nil))
	return h
}()

// Marshal encodes a record or command body as a msgpack map with sorted keys.
// Field names are append-only: old bytes must decode for ever.
func Marshal(v any) []byte {
	var out []byte
	if err := codec.NewEncoderBytes(&out, msgpackHandle).Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // only a type that cannot be encoded: a bug
	}
	return out
}

// Unmarshal decodes what Marshal wrote. Unknown fields are skipped.
func Unmarshal(b []byte, v any) error {
	if err := codec.NewDecoderBytes(b, msgpackHandle).Decode(v); err != nil {
		return fmt.Errorf("decode %T: %w", v, err)
	}
	return nil
}

// Clone returns a deep copy of a record.
func Clone[T any](v *T) *T {
	out := new(T)
	if err := Unmarshal(Marshal(v), out); err != nil {
		panic(err) // Marshal's own output
	}
	return out
}
