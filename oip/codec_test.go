package oip

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func raw(t *testing.T, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// samples are tensors with the edges of every datatype, and what their data is in JSON; "" where it has no JSON form.
func samples(t *testing.T) []struct {
	Tensor
	json string
} {
	s := func(d Datatype, shape []int64, v any, json string) struct {
		Tensor
		json string
	} {
		return struct {
			Tensor
			json string
		}{Tensor{Name: "x-" + string(d), Datatype: d, Shape: shape, Data: raw(t, v)}, json}
	}
	return []struct {
		Tensor
		json string
	}{
		s(BOOL, []int64{2}, []bool{true, false}, "true,false"),
		s(UINT8, []int64{2}, []uint8{0, 255}, "0,255"),
		s(UINT16, []int64{2}, []uint16{0, 65535}, "0,65535"),
		s(UINT32, []int64{2}, []uint32{0, math.MaxUint32}, "0,4294967295"),
		s(UINT64, []int64{2}, []uint64{0, math.MaxUint64}, "0,18446744073709551615"),
		s(INT8, []int64{2}, []int8{-128, 127}, "-128,127"),
		s(INT16, []int64{2}, []int16{-32768, 32767}, "-32768,32767"),
		s(INT32, []int64{2}, []int32{math.MinInt32, math.MaxInt32}, "-2147483648,2147483647"),
		s(INT64, []int64{2}, []int64{math.MinInt64, math.MaxInt64}, "-9223372036854775808,9223372036854775807"),
		s(FP16, []int64{2}, []uint16{0x3c00, 0x7e00}, ""),
		s(BF16, []int64{2}, []uint16{0x3f80, 0x7fc0}, ""),
		s(FP32, []int64{3, 1}, []float32{-1.5, math.MaxFloat32, math.SmallestNonzeroFloat32}, "-1.5,3.4028235e+38,1e-45"),
		s(FP64, []int64{1, 3}, []float64{0.1, math.MaxFloat64, math.SmallestNonzeroFloat64}, "0.1,1.7976931348623157e+308,5e-324"),
		{FromStrings("x-BYTES", []int64{3}, "", "a\"\\\n\u00e9\U0001f600", "b"), `"","a\"\\\u000aé😀","b"`},
		{FromFloat32("x-scalar", []int64{}, []float32{7}), "7"},
		{FromFloat32("x-empty", []int64{0, 4}, nil), ""},
	}
}

func join(head []byte, tail [][]byte) []byte {
	return append(slices.Clone(head), bytes.Join(tail, nil)...)
}

func TestEveryDatatypeBothWays(t *testing.T) {
	for _, tc := range samples(t) {
		want := []Tensor{tc.Tensor}
		req := &Request{ID: "42", Inputs: want, Parameters: map[string]any{"a": "b", "n": int64(3), "f": 1.5, "t": true}, Outputs: []Output{{"y", true}, {"z", false}}, BinaryOutput: true}
		head, tail, err := req.Encode([]byte("before"), true)
		if err != nil {
			t.Fatalf("%s: %v", tc.Datatype, err)
		}
		head = head[len("before"):]
		if len(head)%alignment != 0 {
			t.Errorf("%s: head of %d bytes is not aligned", tc.Datatype, len(head))
		}
		got, err := DecodeRequest(join(head, tail), len(head))
		if err != nil || !reflect.DeepEqual(got, req) {
			t.Errorf("%s: binary request: got %+v, %v; want %+v", tc.Datatype, got, err, req)
		}
		resp := &Response{ModelName: "m", ModelVersion: "1", ID: "42", Outputs: want}
		head, tail, err = resp.Encode(nil, &Request{BinaryOutput: true})
		if err != nil {
			t.Fatal(err)
		}
		gotR, err := DecodeResponse(join(head, tail), len(head))
		if err != nil || !reflect.DeepEqual(gotR, resp) {
			t.Errorf("%s: binary response: got %+v, %v; want %+v", tc.Datatype, gotR, err, resp)
		}

		head, tail, err = resp.Encode(nil, &Request{})
		if tc.Datatype == FP16 || tc.Datatype == BF16 {
			if want := fmt.Sprintf(`output "x-%s": %s has no JSON form: ask for it as binary data`, tc.Datatype, tc.Datatype); err == nil || err.Error() != want {
				t.Errorf("%s as JSON: got %v, want %s", tc.Datatype, err, want)
			}
			continue
		}
		if err != nil || tail != nil {
			t.Fatalf("%s: %v, tail %v", tc.Datatype, err, tail)
		}
		if !json.Valid(head) {
			t.Errorf("%s: not JSON: %s", tc.Datatype, head)
		}
		if want := `"data":[` + tc.json + `]}]}`; !strings.HasSuffix(string(head), want) {
			t.Errorf("%s: got %s, want it to end in %s", tc.Datatype, head, want)
		}
		gotR, err = DecodeResponse(head, -1)
		if err != nil || !reflect.DeepEqual(gotR, resp) {
			t.Errorf("%s: JSON response: got %+v, %v; want %+v", tc.Datatype, gotR, err, resp)
		}
	}
}

func TestManyBinaryInputsKeepTheirOrder(t *testing.T) {
	req := &Request{}
	for _, s := range samples(t) {
		req.Inputs = append(req.Inputs, s.Tensor)
	}
	head, tail, err := req.Encode(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeRequest(join(head, tail), len(head))
	if err != nil || !reflect.DeepEqual(got, req) {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestAcceptedForms lists forms of one request that must all mean the same.
func TestAcceptedForms(t *testing.T) {
	want := FromFloat32("x", []int64{2, 3}, []float32{1, 2, 3, 4, 5, 6})
	for _, body := range []string{
		`{"inputs":[{"name":"x","shape":[2,3],"datatype":"FP32","data":[1,2,3,4,5,6]}]}`,
		`{"inputs":[{"name":"x","shape":[2,3],"datatype":"FP32","data":[[1,2,3],[4,5,6]]}]}`,
		`{"inputs":[{"data":[[1,2,3],[4,5,6]],"datatype":"FP32","shape":[2,3],"name":"x"}]}`,
		` { "other" : [ { "a" : null , "b": [true,false,-1.5e3,"\u00e9"] } ] , "inputs" : [ { "name" : "x" , "shape" : [ 2 , 3 ] , "datatype" : "FP32" , "unknown":{}, "data" : [ 1.0 , 2e0 , 0.3E+1 , 40e-1 , 5 , 6 ] } ] } ` + "\r\n",
	} {
		r, err := DecodeRequest([]byte(body), -1)
		if err != nil || !reflect.DeepEqual(r.Inputs, []Tensor{want}) {
			t.Errorf("%s: got %+v, %v", body, r, err)
		}
	}
}

func TestWantedOutputs(t *testing.T) {
	r, err := DecodeRequest([]byte(`{"outputs":[{"name":"a"},{"name":"b","parameters":{"binary_data":false}}],"parameters":{"binary_data_output":true},"inputs":[]}`), -1)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Binary("a") || r.Binary("b") || !r.Binary("c") {
		t.Errorf("got %+v", r)
	}
}

// TestFaults gives for each bad request its one sentence.
func TestFaults(t *testing.T) {
	in := func(rest string) string { return `{"inputs":[{"name":"x",` + rest + `}]}` }
	f32 := func(shape, data string) string { return in(`"shape":` + shape + `,"datatype":"FP32","data":` + data) }
	typed := func(d, data string) string { return in(`"shape":[1],"datatype":"` + d + `","data":[` + data + `]`) }
	bin := func(d, shape string, size int) string {
		return in(fmt.Sprintf(`"shape":%s,"datatype":"%s","parameters":{"binary_data_size":%d}`, shape, d, size))
	}
	for _, tc := range []struct{ body, tail, want string }{
		{``, "", `expected an inference request, a JSON object, got the end of the JSON at byte 0`},
		{`[]`, "", `expected an inference request, a JSON object, got "[" at byte 0`},
		{`{}`, "", `"inputs" is missing`},
		{`{"inputs":[]} x`, "", `expected the end of the JSON, got "x" at byte 14`},
		{`{"inputs":[]}` + "\x00", "", `expected the end of the JSON, got "\x00" at byte 13`},
		{`{"inputs":[],"inputs":[]}`, "", `"inputs" is given twice`},
		{`{"inputs":[{}]}`, "", `inputs[0]: "name" is missing`},
		{in(`"shape":[1],"data":[1]`), "", `input "x": "datatype" is missing`},
		{in(`"datatype":"FP32","data":[1]`), "", `input "x": "shape" is missing`},
		{in(`"datatype":"FP32","shape":[1]`), "", `input "x": has neither data nor binary_data_size`},
		{in(`"datatype":"FP32","shape":[1],"data":[1],"parameters":{"binary_data_size":4}`), "", `input "x": has both data and binary_data_size`},
		{in(`"datatype":"FLOAT","shape":[1],"data":[1]`), "", `input "x": unknown datatype "FLOAT"`},
		{in(`"shape":[1],"shape":[1]`), "", `input "x": "shape" is given twice`},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":[1]},{"name":"x","shape":[1],"datatype":"INT8","data":[1]}]}`, "", `input "x" is given twice`},
		{f32(`[-1]`, `[]`), "", `input "x": shape: expected a dimension of 0 or more, got -1`},
		{f32(`[1.5]`, `[]`), "", `input "x": shape: expected a dimension of 0 or more, got 1.5`},
		{f32(`[4294967296,4294967296]`, `[]`), "", `input "x": shape [4294967296 4294967296]: the number of elements overflows 63 bits`},
		{f32(`[1000000000]`, `[1]`), "", `input "x": shape [1000000000]: expected 1000000000 elements, got fewer`},
		{f32(`[`+strings.Repeat("1,", 32)+`1]`, `[1]`), "", `input "x": a shape has at most 32 dimensions, got more`},
		{f32(`[2]`, `[1]`), "", `input "x": data: expected 2 elements, got 1`},
		{f32(`[2]`, `[1,2,3]`), "", `input "x": data: expected 2 elements, got more`},
		{f32(`[2,2]`, `[[1,2],[3]]`), "", `input "x": data: expected 2 elements, got 1`},
		{f32(`[2,2]`, `[[1,2]]`), "", `input "x": data: expected 2 arrays for a dimension, got 1`},
		{f32(`[2,2]`, `[[1,2],[3,4],[5,6]]`), "", `input "x": data: expected 2 arrays for a dimension, got more`},
		{f32(`[2]`, `[[1,2]]`), "", `input "x": expected a number, got "[" at byte 61`},
		{f32(`[1]`, `1`), "", `input "x": expected data, a JSON array, got "1" at byte 60`},
		{f32(`[1]`, `["1"]`), "", `input "x": expected a number, got "\"1\"" at byte 61`},
		{f32(`[1]`, `[NaN]`), "", `input "x": expected a number, got "NaN" at byte 61`},
		{f32(`[1]`, `[01]`), "", `input "x": expected a number, got "01" at byte 61`},
		{f32(`[1]`, `[1.]`), "", `input "x": expected a number, got "1." at byte 61`},
		{f32(`[2]`, `[0,1e39]`), "", `input "x": data: 1e39 is no FP32, at element 1`},
		{f32(`[1]`, `[1`), "", `input "x": expected "," or "]", got "}" at byte 62`},
		{typed("FP64", "1e309"), "", `input "x": data: 1e309 is no FP64, at element 0`},
		{typed("UINT8", "256"), "", `input "x": data: 256 is no UINT8, at element 0`},
		{typed("UINT8", "-1"), "", `input "x": data: -1 is no UINT8, at element 0`},
		{typed("INT8", "128"), "", `input "x": data: 128 is no INT8, at element 0`},
		{typed("INT32", "1.0"), "", `input "x": data: 1.0 is no INT32, at element 0`},
		{typed("INT64", "9223372036854775808"), "", `input "x": data: 9223372036854775808 is no INT64, at element 0`},
		{typed("UINT64", "18446744073709551616"), "", `input "x": data: 18446744073709551616 is no UINT64, at element 0`},
		{typed("BOOL", "1"), "", `input "x": expected true or false, got "1" at byte 61`},
		{typed("FP16", "1"), "", `input "x": FP16 has no JSON form: send it as binary data`},
		{typed("BF16", "1"), "", `input "x": BF16 has no JSON form: send it as binary data`},
		{typed("BYTES", "1"), "", `input "x": expected a BYTES element, a string, got "1" at byte 62`},
		{typed("BYTES", "\"\xff\""), "", `input "x": the string at byte 63 is not UTF-8`},
		{typed("BYTES", `"\ud800"`), "", `input "x": half of a surrogate pair at byte 69`},
		{typed("BYTES", `"\x"`), "", `input "x": unknown escape "\\x" at byte 64`},
		{bin("FP32", "[2]", 8), "1234567", `input "x": binary_data_size is 8, but 7 bytes of the body are left`},
		{bin("FP32", "[2]", 8), "123456789", `the body has 1 bytes more than the JSON and the binary tensors that it names`},
		{bin("FP32", "[3]", 8), "12345678", `input "x": FP32 of shape [3]: expected 3 elements of 4 bytes, got 8 bytes`},
		{bin("FP32", "[9223372036854775807]", 4), "1234", `input "x": FP32 of shape [9223372036854775807]: expected 9223372036854775807 elements of 4 bytes, got 4 bytes`},
		{bin("BOOL", "[1]", 1), "\x02", `input "x": a BOOL is a byte of value 0 or 1, got 2 at element 0`},
		{bin("BYTES", "[1]", 5), "\x02\x00\x00\x00a", `input "x": BYTES of shape [1]: element 0 says 2 bytes, 1 are left`},
		{bin("BYTES", "[2]", 8), "\x04\x00\x00\x00abcd", `input "x": BYTES of shape [2]: expected 2 elements, got 1`},
		{bin("BYTES", "[1]", 6), "\x01\x00\x00\x00ab", `input "x": BYTES of shape [1]: 1 bytes are left over after 1 elements`},
		{bin("BYTES", "[9]", 4), "\x00\x00\x00\x00", `input "x": BYTES of shape [9]: expected 9 elements, got 4 bytes, too few for their lengths`},
		{in(`"shape":[1],"datatype":"INT8","parameters":{"binary_data_size":-1}`), "", `input "x": binary_data_size: expected a number of bytes, got -1`},
		{`{"inputs":[],"parameters":{"binary_data_output":1}}`, "", `binary_data_output: expected true or false, got 1`},
		{`{"inputs":[],"parameters":{"a":[]}}`, "", `expected a string, a number or a boolean, got "[" at byte 31`},
		{`{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}`, "", `output "y" is asked for twice`},
		{`{"inputs":[],"outputs":[{}]}`, "", `outputs[0]: "name" is missing`},
		{`{"inputs":[],"outputs":[{"name":"y","parameters":{"classification":2}}]}`, "", `outputs[0]: parameter "classification" is an extension that this server does not have`},
		{`{"inputs":[],"bomb":` + strings.Repeat("[", 100_000), "", `JSON nested deeper than 64`},
		{f32(`[1,1]`, strings.Repeat("[", 100_000)), "", `input "x": expected a number, got "[" at byte 64`},
		{`{"inputs":[` + strings.Repeat(`{"name":"x"},`, 10) + `{}]}`, "", `input "x": "datatype" is missing`},
	} {
		_, err := DecodeRequest([]byte(tc.body+tc.tail), len(tc.body))
		if err == nil || err.Error() != tc.want || StatusOf(err) != 400 {
			t.Errorf("%.120s: got %v\nwant %s", tc.body, err, tc.want)
		}
	}
	if _, err := DecodeRequest([]byte("{}"), 3); err == nil || err.Error() != "Inference-Header-Content-Length is 3, but the body has 2 bytes" {
		t.Error(err)
	}
}

func TestOutputsThatJSONCannotCarry(t *testing.T) {
	for _, tc := range []struct {
		Tensor
		want string
	}{
		{FromFloat32("y", []int64{2}, []float32{0, float32(math.NaN())}), `output "y": element 1 is NaN, which JSON cannot carry: ask for it as binary data`},
		{FromFloat32("y", []int64{1}, []float32{float32(math.Inf(-1))}), `output "y": element 0 is -Inf, which JSON cannot carry: ask for it as binary data`},
		{FromStrings("y", []int64{1}, "\xff"), `output "y": element 0 is not UTF-8, which JSON cannot carry: ask for it as binary data`},
	} {
		r := Response{Outputs: []Tensor{tc.Tensor}}
		if _, _, err := r.Encode(nil, &Request{}); err == nil || err.Error() != tc.want {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}
}

// TestNumbersAgreeWithStrconv compares the number scanner with the standard library on hard and random numbers.
func TestNumbersAgreeWithStrconv(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	texts := []string{"0", "-0", "0.0", "-0.0e5", "16777217", "16777217.0000000001", "33554433", "1.00000005960464477540", "5e-324", "1e-46", "1.1754944e-38", "1.1754943508222874e-38", "3.4028235677973366e38", "3.4028235e38", "9007199254740993", "1e22", "1e23", "123456789012345678901234567890e-20", "0.000000000000000000000000000001e30", "1e400", "1e-400", "1e99999999999", "0e99999999999"}
	for range 200_000 {
		f := math.Float64frombits(rnd.Uint64())
		if math.IsNaN(f) || math.IsInf(f, 0) {
			continue
		}
		texts = append(texts, strconv.FormatFloat(f, 'g', -1, 64), strconv.FormatFloat(float64(float32(rnd.NormFloat64())), 'g', -1, 64), strconv.FormatFloat(rnd.NormFloat64(), 'f', rnd.IntN(20), 64))
		half := math.Float32frombits(rnd.Uint32() & 0x7f7fffff)
		texts = append(texts, strconv.FormatFloat((float64(half)+float64(math.Nextafter32(half, math.MaxFloat32)))/2, 'g', -1, 64))
	}
	for _, text := range texts {
		s := scanner{b: []byte(text)}
		n := s.number()
		s.end()
		if s.err != nil {
			t.Fatalf("%s: %v", text, s.err)
		}
		got64, ok64 := n.float64()
		want64, err64 := strconv.ParseFloat(text, 64)
		if ok64 != (err64 == nil) || ok64 && math.Float64bits(got64) != math.Float64bits(want64) {
			t.Errorf("%s: FP64 got %v %t, want %v %v", text, got64, ok64, want64, err64)
		}
		got32, ok32 := n.float32()
		want32, err32 := strconv.ParseFloat(text, 32)
		if ok32 != (err32 == nil) || ok32 && math.Float32bits(got32) != math.Float32bits(float32(want32)) {
			t.Errorf("%s: FP32 got %v %t, want %v %v", text, got32, ok32, want32, err32)
		}
	}
}

func TestFloats(t *testing.T) {
	for _, tc := range []struct {
		Tensor
		want []float64
	}{
		{Tensor{Datatype: FP16, Shape: []int64{5}, Data: raw(t, []uint16{0x3c00, 0xc000, 0x0001, 0x7c00, 0x3555})}, []float64{1, -2, 0x1p-24, math.Inf(1), 0.333251953125}},
		{Tensor{Datatype: BF16, Shape: []int64{2}, Data: raw(t, []uint16{0x3f80, 0xc040})}, []float64{1, -3}},
		{Tensor{Datatype: FP64, Shape: []int64{1}, Data: raw(t, []float64{0.1})}, []float64{0.1}},
		{FromFloat32("", []int64{1}, []float32{0.5}), []float64{0.5}},
	} {
		if got, err := tc.Floats(); err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %v, %v, want %v", tc.Datatype, got, err, tc.want)
		}
	}
	bad := Tensor{Name: "n", Datatype: INT8}
	if _, err := bad.Floats(); err == nil || err.Error() != `tensor "n": expected floating-point numbers, got INT8` {
		t.Error(err)
	}
}

// FuzzDecodeRequest holds that decoding never fails in another way than by an error, that what it accepts as JSON is
// JSON, and that what was decoded survives encoding and decoding.
func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"inputs":[{"name":"x","shape":[2,3],"datatype":"FP32","data":[[1,2,3],[4,5,6]]}]}`), -1)
	f.Add([]byte(`{"id":"a","parameters":{"binary_data_output":true,"p":1},"inputs":[{"name":"x","shape":[2],"datatype":"BYTES","data":["a","\u00e9"]}],"outputs":[{"name":"y","parameters":{"binary_data":false}}]}`), -1)
	f.Add([]byte(`{"inputs":[{"name":"x","shape":[1],"datatype":"UINT8","parameters":{"binary_data_size":1}}]}a`), 92)
	f.Add([]byte(`{"inputs":[{"name":"x","shape":[3],"datatype":"INT64","data":[1,-2,3]},{"name":"y","shape":[],"datatype":"BOOL","data":[true]}]}`), -1)
	f.Fuzz(func(t *testing.T, body []byte, headerLen int) {
		r, err := DecodeRequest(body, headerLen)
		if err != nil {
			if StatusOf(err) != 400 {
				t.Fatalf("not a 400: %v", err)
			}
			return
		}
		if headerLen < 0 {
			headerLen = len(body)
		}
		if !json.Valid(body[:headerLen]) {
			t.Fatalf("accepted what is not JSON: %q", body[:headerLen])
		}
		for i := range r.Inputs {
			if err := r.Inputs[i].Check(); err != nil {
				t.Fatalf("accepted %+v: %v", r.Inputs[i], err)
			}
		}
		head, tail, err := r.Encode(nil, true)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeRequest(join(head, tail), len(head))
		if err != nil {
			t.Fatalf("decode %q: %v", head, err)
		}
		normalise(r)
		normalise(again)
		if !reflect.DeepEqual(r, again) {
			t.Fatalf("got %+v, want %+v", again, r)
		}
	})
}

// normalise levels what encoding does not keep: an empty slice against none, 1.0 against 1.
func normalise(r *Request) {
	for i := range r.Inputs {
		r.Inputs[i].Data = append([]byte{}, r.Inputs[i].Data...)
	}
	for k, v := range r.Parameters {
		if n, ok := v.(int64); ok {
			r.Parameters[k] = float64(n)
		}
	}
}

func FuzzDecodeResponse(f *testing.F) {
	f.Add([]byte(`{"model_name":"m","model_version":"1","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[0.5,1e-3]}]}`), -1)
	f.Fuzz(func(t *testing.T, body []byte, headerLen int) {
		r, err := DecodeResponse(body, headerLen)
		if err != nil {
			return
		}
		for i := range r.Outputs {
			if err := r.Outputs[i].Check(); err != nil {
				t.Fatalf("accepted %+v: %v", r.Outputs[i], err)
			}
		}
	})
}

// image is a request of the size of one image of the OCR classifier, as Python clients write it.
func image() []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	b := []byte(`{"inputs":[{"name":"x","shape":[1,3,48,192],"datatype":"FP32","data":[`)
	for i := range 3 * 48 * 192 {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = strconv.AppendFloat(b, float64(float32(rnd.NormFloat64())), 'g', -1, 64)
	}
	return append(b, "]}]}"...)
}

func BenchmarkDecodeJSON(b *testing.B) {
	body := image()
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeRequest(body, -1); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeEncodingJSON(b *testing.B) {
	body := image()
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		var r struct {
			Inputs []struct {
				Name, Datatype string
				Shape          []int64
				Data           []float32
			}
		}
		if err := json.Unmarshal(body, &r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncodeJSON(b *testing.B) {
	r, err := DecodeRequest(image(), -1)
	if err != nil {
		b.Fatal(err)
	}
	resp := Response{ModelName: "m", Outputs: r.Inputs}
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		if buf, _, err = resp.Encode(buf[:0], &Request{}); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(buf)))
}
