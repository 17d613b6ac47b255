package oip

import (
	"encoding/binary"
	"math"
)

// The parameters that the binary tensor extension defines.
const (
	paramSize   = "binary_data_size"
	paramBinary = "binary_data"
	paramOutput = "binary_data_output"
)

// DecodeRequest reads the body of an inference request. headerLen is the value of the HeaderLength header, or negative
// when there is none and the whole body is JSON. Binary tensors alias body, all else is copied. Faults are an *Error
// with status 400 that names the tensor, what was expected and what came.
func DecodeRequest(body []byte, headerLen int) (*Request, error) {
	var r Request
	var seen once
	m, err := newMessage(body, headerLen)
	if err != nil {
		return nil, err
	}
	outputs := []wanted{}
	s := &m.scanner
	s.object("an inference request", func(key []byte) {
		seen.add(s, key, "id", "parameters", "inputs", "outputs")
		switch string(key) {
		case "id":
			r.ID = s.name("id")
		case "parameters":
			r.Parameters = s.parameters("parameters", func(key string, value any) bool {
				if key != paramOutput {
					return false
				}
				r.BinaryOutput = asBool(s, key, value)
				return true
			})
		case "inputs":
			r.Inputs = m.tensors("input")
		case "outputs":
			outputs = decodeOutputs(s)
		default:
			s.skip(0)
		}
	})
	s.end()
	if s.err == nil && r.Inputs == nil {
		s.fail(`"inputs" is missing`)
	}
	m.attach(r.Inputs)
	if s.err != nil {
		return nil, s.err
	}
	for _, w := range outputs {
		o := Output{Name: w.name, Binary: r.BinaryOutput}
		if w.binary != nil {
			o.Binary = *w.binary
		}
		r.Outputs = append(r.Outputs, o)
	}
	return &r, nil
}

// DecodeResponse reads the body of the answer to an inference request; see DecodeRequest for headerLen, aliasing and
// faults.
func DecodeResponse(body []byte, headerLen int) (*Response, error) {
	var r Response
	var seen once
	m, err := newMessage(body, headerLen)
	if err != nil {
		return nil, err
	}
	s := &m.scanner
	s.object("an inference response", func(key []byte) {
		seen.add(s, key, "model_name", "model_version", "id", "parameters", "outputs")
		switch string(key) {
		case "model_name":
			r.ModelName = s.name("model_name")
		case "model_version":
			r.ModelVersion = s.name("model_version")
		case "id":
			r.ID = s.name("id")
		case "parameters":
			r.Parameters = s.parameters("parameters", nil)
		case "outputs":
			r.Outputs = m.tensors("output")
		default:
			s.skip(0)
		}
	})
	s.end()
	if s.err == nil && r.Outputs == nil {
		s.fail(`"outputs" is missing`)
	}
	m.attach(r.Outputs)
	if s.err != nil {
		return nil, s.err
	}
	return &r, nil
}

// message is a body: JSON, then the binary data of those tensors that say so.
type message struct {
	scanner
	kind  string  // "input" or "output", for messages
	raw   []byte  // what follows the JSON
	sizes []int64 // per tensor its binary size, or -1 when its data was in the JSON
}

func newMessage(body []byte, headerLen int) (*message, error) {
	if headerLen < 0 {
		headerLen = len(body)
	}
	if headerLen > len(body) {
		return nil, badf("%s is %d, but the body has %d bytes", HeaderLength, headerLen, len(body))
	}
	return &message{scanner: scanner{b: body[:headerLen]}, raw: body[headerLen:]}, nil
}

// attach gives the binary tensors their part of the body, in order.
func (m *message) attach(tensors []Tensor) {
	if m.err != nil {
		return
	}
	left := int64(len(m.raw))
	for i, size := range m.sizes {
		if size > left {
			m.fail("%s %s: %s is %d, but %d bytes of the body are left", m.kind, quote(tensors[i].Name), paramSize, size, left)
			return
		}
		left -= max(size, 0)
	}
	if left > 0 {
		m.fail("the body has %d bytes more than the JSON and the binary tensors that it names", left)
		return
	}
	for i, size := range m.sizes {
		if size < 0 {
			continue
		}
		t := &tensors[i]
		t.Data, m.raw = m.raw[:size:size], m.raw[size:]
		if err := t.Check(); err != nil {
			m.fail("%s %s: %s", m.kind, quote(t.Name), err)
			return
		}
	}
}

// tensors consumes the array of inputs or outputs.
func (m *message) tensors(kind string) []Tensor {
	m.kind = kind
	out := []Tensor{}
	names := map[string]bool{}
	m.array(`"`+kind+`s"`, func(i int) {
		if i == MaxTensors {
			m.fail("at most %d %ss, got more", MaxTensors, kind)
			return
		}
		t, size := m.tensor(kind, i)
		if m.err == nil && names[t.Name] {
			m.fail("%s %s is given twice", kind, quote(t.Name))
		}
		names[t.Name] = true
		out = append(out, t)
		m.sizes = append(m.sizes, size)
	})
	return out
}

// tensor consumes one tensor and gives the size of its binary data, or -1 when its data was here.
func (m *message) tensor(kind string, index int) (t Tensor, size int64) {
	s := &m.scanner
	size = -1
	dataAt := -1
	var seen once
	s.object("an "+kind, func(key []byte) {
		seen.add(s, key, "name", "shape", "datatype", "parameters", "data")
		switch string(key) {
		case "name":
			t.Name = s.name("name")
		case "datatype":
			t.Datatype = Datatype(s.name("datatype"))
		case "shape":
			t.Shape = s.shape()
		case "parameters":
			s.parameters("parameters", func(key string, value any) bool {
				if key != paramSize {
					return false
				}
				n, ok := value.(int64)
				if !ok || n < 0 {
					s.fail("%s: expected a number of bytes, got %v", paramSize, value)
				}
				size = n
				return true
			})
		case "data":
			// Elements can be read only once shape and datatype are known, which well-behaved senders put first.
			dataAt = s.i
			if t.Shape != nil && t.Datatype != "" {
				s.data(&t)
			} else {
				s.skip(0)
			}
		default:
			s.skip(0)
		}
	})
	if s.err == nil {
		s.complete(&t, size, dataAt)
	}
	if s.err != nil {
		where := Errorf(400, "%ss[%d]: %s", kind, index, s.err)
		if t.Name != "" {
			where = badf("%s %s: %s", kind, quote(t.Name), s.err)
		}
		s.err = where
	}
	return t, size
}

// complete checks that a tensor has all its members, and reads data that came before shape or datatype.
func (s *scanner) complete(t *Tensor, size int64, dataAt int) {
	switch {
	case t.Name == "":
		s.fail(`"name" is missing`)
	case t.Datatype == "":
		s.fail(`"datatype" is missing`)
	case t.Datatype.Size() < 0:
		s.fail("unknown datatype %s", quote(string(t.Datatype)))
	case t.Shape == nil:
		s.fail(`"shape" is missing`)
	case size >= 0 && dataAt >= 0:
		s.fail("has both data and %s", paramSize)
	case size < 0 && dataAt < 0:
		s.fail("has neither data nor %s", paramSize)
	case dataAt >= 0 && t.Data == nil:
		end := s.i
		s.i = dataAt
		s.data(t)
		s.i = end
	}
}

// shape consumes a shape; the result is never nil without an error.
func (s *scanner) shape() []int64 {
	shape := []int64{}
	s.array("shape", func(i int) {
		n := s.number()
		d, ok := n.signed(64)
		switch {
		case s.err != nil:
		case i == MaxRank:
			s.fail("a shape has at most %d dimensions, got more", MaxRank)
		case !ok || d < 0:
			s.fail("shape: expected a dimension of 0 or more, got %s", clip(string(n.text), 32))
		}
		shape = append(shape, d)
	})
	return shape
}

// data consumes the elements of t: one flat array, or arrays nested as the shape says.
func (s *scanner) data(t *Tensor) {
	if s.err != nil {
		return
	}
	size := t.Datatype.Size()
	switch {
	case size < 0:
		s.fail("unknown datatype %s", quote(string(t.Datatype)))
		return
	case t.Datatype == FP16 || t.Datatype == BF16:
		s.fail("%s has no JSON form: send it as binary data", t.Datatype)
		return
	}
	n, err := Elements(t.Shape)
	if err != nil {
		s.fail("%s", err)
		return
	}
	// Each element takes a byte and a comma at least, so memory follows what was sent, not what was claimed.
	if most := int64(len(s.b)-s.i)/2 + 1; n > most {
		s.fail("shape %v: expected %d elements, got fewer", t.Shape, n)
		return
	}
	if size == 0 {
		size = 4 + 4 // the length and a guess at the bytes
	}
	e := elements{scanner: s, datatype: t.Datatype, out: make([]byte, 0, int(n)*size)}
	start := s.i
	if !s.take('[', "data, a JSON array") {
		return
	}
	nested := len(t.Shape) > 1 && s.peek() == '['
	s.i = start
	if nested {
		e.nested(t.Shape)
	} else {
		e.flat(n)
	}
	t.Data = e.out
}

// elements appends elements of one datatype to out as they are scanned.
type elements struct {
	*scanner
	datatype Datatype
	out      []byte
	count    int // elements so far
}

// nested consumes arrays nested as shape says.
func (e *elements) nested(shape []int64) {
	if len(shape) == 1 {
		e.flat(shape[0])
		return
	}
	got := int64(0)
	e.array("an array for each dimension", func(i int) {
		if got++; got > shape[0] {
			e.fail("data: expected %d arrays for a dimension, got more", shape[0])
			return
		}
		e.nested(shape[1:])
	})
	if got < shape[0] {
		e.fail("data: expected %d arrays for a dimension, got %d", shape[0], got)
	}
}

// flat consumes an array of exactly n elements.
func (e *elements) flat(n int64) {
	got := int64(0)
	if !e.take('[', "an array of elements") {
		return
	}
	if e.peek() == ']' {
		e.i++
	} else {
		for {
			if got++; got > n {
				e.fail("data: expected %d elements, got more", n)
				return
			}
			e.element()
			if !e.more(']') {
				break
			}
			e.count++
		}
	}
	if got < n {
		e.fail("data: expected %d elements, got %d", n, got)
	}
}

// element consumes one element.
func (e *elements) element() {
	le := binary.LittleEndian
	switch d := e.datatype; d {
	case BOOL:
		b := byte(0)
		if e.boolean() {
			b = 1
		}
		e.out = append(e.out, b)
	case BYTES:
		b := e.text("a BYTES element")
		if uint64(len(b)) > math.MaxUint32 {
			e.fail("a BYTES element has at most %d bytes", uint32(math.MaxUint32))
			return
		}
		e.out = append(le.AppendUint32(e.out, uint32(len(b))), b...)
	case FP32:
		n := e.number()
		f, ok := n.float32()
		e.check(&n, ok)
		e.out = le.AppendUint32(e.out, math.Float32bits(f))
	case FP64:
		n := e.number()
		f, ok := n.float64()
		e.check(&n, ok)
		e.out = le.AppendUint64(e.out, math.Float64bits(f))
	default:
		n := e.number()
		size := d.Size()
		var v uint64
		var ok bool
		if d[0] == 'U' {
			v, ok = n.unsigned(8 * size)
		} else {
			var i int64
			i, ok = n.signed(8 * size)
			v = uint64(i)
		}
		e.check(&n, ok)
		switch size {
		case 1:
			e.out = append(e.out, byte(v))
		case 2:
			e.out = le.AppendUint16(e.out, uint16(v))
		case 4:
			e.out = le.AppendUint32(e.out, uint32(v))
		case 8:
			e.out = le.AppendUint64(e.out, v)
		}
	}
}

// check reports a number that the datatype cannot hold.
func (e *elements) check(n *number, ok bool) {
	if !ok {
		e.fail("data: %s is no %s, at element %d", clip(string(n.text), 32), e.datatype, e.count)
	}
}

// wanted is an entry of a request's "outputs".
type wanted struct {
	name   string
	binary *bool
}

func decodeOutputs(s *scanner) (outputs []wanted) {
	names := map[string]bool{}
	s.array(`"outputs"`, func(i int) {
		if i == MaxTensors {
			s.fail("at most %d outputs, got more", MaxTensors)
			return
		}
		var w wanted
		var seen once
		s.object("an output", func(key []byte) {
			seen.add(s, key, "name", "parameters")
			switch string(key) {
			case "name":
				w.name = s.name("name")
			case "parameters":
				s.parameters("parameters", func(key string, value any) bool {
					switch key {
					case paramBinary:
						b := asBool(s, key, value)
						w.binary = &b
					case "classification", "shared_memory_region":
						s.fail("outputs[%d]: parameter %q is an extension that this server does not have", i, key)
					}
					return false
				})
			default:
				s.skip(0)
			}
		})
		switch {
		case s.err != nil:
		case w.name == "":
			s.fail(`outputs[%d]: "name" is missing`, i)
		case names[w.name]:
			s.fail("output %s is asked for twice", quote(w.name))
		}
		names[w.name] = true
		outputs = append(outputs, w)
	})
	return outputs
}

// maxParameters bounds the parameters of one object.
const maxParameters = 64

// parameters consumes an object of scalars; those that own accepts are left out of the result.
func (s *scanner) parameters(what string, own func(key string, value any) bool) map[string]any {
	var out map[string]any
	count := 0
	s.object(what, func(key []byte) {
		name := string(key)
		if count++; count > maxParameters || len(name) > MaxName {
			s.fail("at most %d %s with names of at most %d bytes, got more", maxParameters, what, MaxName)
			return
		}
		if s.peek() == 'n' && s.literal("null") {
			return
		}
		value := s.scalar()
		if s.err != nil || own != nil && own(name, value) {
			return
		}
		if _, twice := out[name]; twice {
			s.fail("parameter %s is given twice", quote(name))
			return
		}
		if out == nil {
			out = map[string]any{}
		}
		out[name] = value
	})
	return out
}

func asBool(s *scanner, key string, value any) bool {
	b, ok := value.(bool)
	if !ok {
		s.fail("%s: expected true or false, got %v", key, value)
	}
	return b
}

// once remembers which known members an object had.
type once uint8

// add fails when key is one of known and came before.
func (o *once) add(s *scanner, key []byte, known ...string) {
	for i, k := range known {
		if string(key) == k {
			if *o&(1<<i) != 0 {
				s.fail("%q is given twice", k)
			}
			*o |= 1 << i
		}
	}
}
