package oip

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"unicode/utf8"
)

// alignment is what the JSON part of a binary message is padded to with spaces, so that in a receiver's buffer the
// tensors behind it are aligned for their elements.
const alignment = 64

// Encode appends the JSON part of the request to dst and gives it as head; tail holds the binary data of the inputs, which
// alias the request and follow head on the wire. binary sends all inputs as binary data; otherwise tail is nil, all is
// JSON, and no HeaderLength is needed.
func (r *Request) Encode(dst []byte, binary bool) (head []byte, tail [][]byte, err error) {
	start := len(dst)
	dst = append(dst, '{')
	if r.ID != "" {
		dst = appendString(append(dst, `"id":`...), r.ID)
		dst = append(dst, ',')
	}
	params := r.Parameters
	if r.BinaryOutput {
		params = map[string]any{paramOutput: true}
		for k, v := range r.Parameters {
			params[k] = v
		}
	}
	if dst, err = appendParameters(dst, params); err != nil {
		return nil, nil, err
	}
	if len(r.Outputs) > 0 {
		dst = append(dst, `"outputs":[`...)
		for i, o := range r.Outputs {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendString(append(dst, `{"name":`...), o.Name)
			dst = fmt.Appendf(dst, `,"parameters":{"binary_data":%t}}`, o.Binary)
		}
		dst = append(dst, `],`...)
	}
	return appendTensors(dst, start, "input", r.Inputs, func(string) bool { return binary })
}

// Encode appends the JSON part of the response to dst and gives it as head; tail holds the binary data of those outputs
// that request wants as such, which alias the response and follow head on the wire. A nil tail means that all is JSON,
// and no HeaderLength is needed. An output that JSON cannot carry is an *Error with status 400 that says so.
func (r *Response) Encode(dst []byte, request *Request) (head []byte, tail [][]byte, err error) {
	start := len(dst)
	dst = appendString(append(dst, `{"model_name":`...), r.ModelName)
	dst = append(dst, ',')
	if r.ModelVersion != "" {
		dst = appendString(append(dst, `"model_version":`...), r.ModelVersion)
		dst = append(dst, ',')
	}
	if r.ID != "" {
		dst = appendString(append(dst, `"id":`...), r.ID)
		dst = append(dst, ',')
	}
	if dst, err = appendParameters(dst, r.Parameters); err != nil {
		return nil, nil, err
	}
	return appendTensors(dst, start, "output", r.Outputs, request.Binary)
}

func appendParameters(dst []byte, params map[string]any) ([]byte, error) {
	if len(params) == 0 {
		return dst, nil
	}
	b, err := json.Marshal(params)
	if err != nil {
		return nil, fmt.Errorf("encode parameters: %w", err)
	}
	dst = append(dst, `"parameters":`...)
	return append(append(dst, b...), ','), nil
}

// appendTensors ends a message, which begins at start, with its tensors.
func appendTensors(dst []byte, start int, kind string, tensors []Tensor, binary func(name string) bool) (
	head []byte, tail [][]byte, err error,
) {
	dst = append(append(append(dst, '"'), kind...), `s":[`...)
	for i := range tensors {
		t := &tensors[i]
		if err := t.Check(); err != nil {
			return nil, nil, badf("%s %s: %s", kind, quote(t.Name), err)
		}
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(append(dst, `{"name":`...), t.Name)
		dst = append(append(append(dst, `,"datatype":"`...), t.Datatype...), `","shape":[`...)
		for j, d := range t.Shape {
			if j > 0 {
				dst = append(dst, ',')
			}
			dst = strconv.AppendInt(dst, d, 10)
		}
		dst = append(dst, ']')
		if binary(t.Name) {
			dst = append(dst, `,"parameters":{"binary_data_size":`...)
			dst = append(strconv.AppendInt(dst, int64(len(t.Data)), 10), `}}`...)
			tail = append(tail, t.Data)
			continue
		}
		if dst, err = appendData(append(dst, `,"data":[`...), t); err != nil {
			return nil, nil, badf("%s %s: %s", kind, quote(t.Name), err)
		}
		dst = append(dst, `]}`...)
	}
	dst = append(dst, `]}`...)
	if tail != nil {
		for (len(dst)-start)%alignment != 0 {
			dst = append(dst, ' ')
		}
	}
	return dst, tail, nil
}

// appendData appends the elements of a tensor that has passed Check, with commas between them.
func appendData(dst []byte, t *Tensor) ([]byte, error) {
	le := binary.LittleEndian
	data, size := t.Data, t.Datatype.Size()
	switch t.Datatype {
	case FP16, BF16:
		return nil, badf("%s has no JSON form: ask for it as binary data", t.Datatype)
	case BYTES:
		n, err := Elements(t.Shape)
		if err != nil {
			return nil, err
		}
		for i := range n {
			b := data[4 : 4+le.Uint32(data)]
			data = data[4+len(b):]
			if i > 0 {
				dst = append(dst, ',')
			}
			if !utf8.Valid(b) {
				return nil, badf("element %d is not UTF-8, which JSON cannot carry: ask for it as binary data", i)
			}
			dst = appendString(dst, b)
		}
	default:
		for i := 0; i < len(data); i += size {
			if i > 0 {
				dst = append(dst, ',')
			}
			switch t.Datatype {
			case BOOL:
				dst = strconv.AppendBool(dst, data[i] == 1)
			case UINT8:
				dst = strconv.AppendUint(dst, uint64(data[i]), 10)
			case UINT16:
				dst = strconv.AppendUint(dst, uint64(le.Uint16(data[i:])), 10)
			case UINT32:
				dst = strconv.AppendUint(dst, uint64(le.Uint32(data[i:])), 10)
			case UINT64:
				dst = strconv.AppendUint(dst, le.Uint64(data[i:]), 10)
			case INT8:
				dst = strconv.AppendInt(dst, int64(int8(data[i])), 10)
			case INT16:
				dst = strconv.AppendInt(dst, int64(int16(le.Uint16(data[i:]))), 10)
			case INT32:
				dst = strconv.AppendInt(dst, int64(int32(le.Uint32(data[i:]))), 10)
			case INT64:
				dst = strconv.AppendInt(dst, int64(le.Uint64(data[i:])), 10)
			case FP32, FP64:
				bits, v := 64, 0.0
				if size == 8 {
					v = math.Float64frombits(le.Uint64(data[i:]))
				} else {
					bits, v = 32, float64(math.Float32frombits(le.Uint32(data[i:])))
				}
				if math.IsNaN(v) || math.IsInf(v, 0) {
					return nil, badf("element %d is %v, which JSON cannot carry: ask for it as binary data", i/size, v)
				}
				dst = strconv.AppendFloat(dst, v, 'g', -1, bits)
			}
		}
	}
	return dst, nil
}

const hex = "0123456789abcdef"

// appendString appends s as a JSON string; s must be UTF-8.
func appendString[S string | []byte](dst []byte, s S) []byte {
	dst = append(dst, '"')
	from := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[from:i]...)
		from = i + 1
		if c < ' ' {
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		} else {
			dst = append(dst, '\\', c)
		}
	}
	return append(append(dst, s[from:]...), '"')
}
