package vision

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/oip"
)

// model is a sound image model's metadata, with some properties replaced; an empty one is taken out.
func model(replace ...string) oip.ModelMetadata {
	m := oip.ModelMetadata{
		Inputs:  []oip.TensorMetadata{{Name: "images", Datatype: oip.FP32, Shape: []int64{-1, 1, 28, 28}}},
		Outputs: []oip.TensorMetadata{{Name: "logits", Datatype: oip.FP32, Shape: []int64{-1, 3}}},
		Properties: map[string]string{
			KeyLabels: `["a","b","c"]`,
			KeyPreprocess: `{"input":"images","width":28,"height":28,"channels":1,"layout":"NCHW","scale":0.00392156862745098,
				"mean":[0.2860],"std":[0.3530],"resize":"stretch","filter":"bilinear"}`,
			KeyPostprocess: `{"output":"logits","activation":"softmax"}`,
			"other":        "is left alone",
		},
	}
	for i := 0; i < len(replace); i += 2 {
		m.Properties[replace[i]] = replace[i+1]
		if replace[i+1] == "" {
			delete(m.Properties, replace[i])
		}
	}
	return m
}

func TestParse(t *testing.T) {
	r, err := Parse(model())
	want := &Record{
		Labels:      []string{"a", "b", "c"},
		Preprocess:  Preprocess{"images", 28, 28, 1, "NCHW", 1.0 / 255, []float64{0.286}, []float64{0.353}, "stretch", "bilinear"},
		Postprocess: Postprocess{"logits", "softmax"},
	}
	if err != nil || !reflect.DeepEqual(r, want) {
		t.Errorf("got %+v, %v", r, err)
	}
	r, err = Parse(model(KeyPreprocess, `{"input":"images","width":28,"height":28,"channels":1}`, KeyLabels, ""))
	want.Labels = nil
	want.Preprocess = Preprocess{"images", 28, 28, 1, "NCHW", 1, []float64{0}, []float64{1}, "stretch", "bilinear"}
	if err != nil || !reflect.DeepEqual(r, want) {
		t.Errorf("defaults: got %+v, %v", r, err)
	}
	if r, err := Parse(oip.ModelMetadata{Properties: map[string]string{"author": "x"}}); r != nil || err != nil {
		t.Errorf("no image model: got %+v, %v", r, err)
	}
}

func TestParseReportsEveryFault(t *testing.T) {
	for _, tc := range []struct {
		m    oip.ModelMetadata
		want []string
	}{
		{model(KeyPreprocess, ""), []string{"rxvision.preprocess: is missing, but other keys for images are there"}},
		{model(KeyPostprocess, ""), []string{"rxvision.postprocess: is missing"}},
		{model(KeyPreprocess, "[]", KeyPostprocess, "x", KeyLabels, `[1]`), []string{
			"rxvision.preprocess: expected a JSON object",
			"rxvision.labels: expected a JSON array of strings",
			"rxvision.postprocess: expected a JSON object",
		}},
		{model(KeyLabels, `["a",""]`, KeyPreprocess, `{"input":1,"width":"28","height":2.5,"hue":1,"mean":0.5}`), []string{
			"rxvision.preprocess: height: expected an integer, got 2.5",
			"rxvision.preprocess: hue: unknown field, expected one of channels, filter, height, input, layout, mean, resize, scale, std, width",
			"rxvision.preprocess: input: expected a string, got 1",
			"rxvision.preprocess: mean: expected an array of numbers, got 0.5",
			`rxvision.preprocess: width: expected an integer, got "28"`,
			"rxvision.preprocess: channels: is missing",
			"rxvision.labels: label 1 is empty",
			"rxvision.labels: the model has 3 classes, got 2 labels",
		}},
		{model(KeyPreprocess, `{"input":"x","width":0,"height":99999,"channels":3,"layout":"CHW","scale":0,"mean":[1],"std":[1,0],"resize":"fill","filter":"box"}`,
			KeyPostprocess, `{"output":"y","activation":"relu"}`), []string{
			"rxvision.preprocess: width: expected 1 to 8192 pixels, got 0",
			"rxvision.preprocess: height: expected 1 to 8192 pixels, got 99999",
			`rxvision.preprocess: layout: expected NCHW or NHWC, got "CHW"`,
			`rxvision.preprocess: resize: expected stretch or crop or pad, got "fill"`,
			`rxvision.preprocess: filter: expected bilinear or bicubic or nearest, got "box"`,
			"rxvision.preprocess: scale: expected a number other than 0",
			"rxvision.preprocess: mean: expected a number for each of 3 channels, got 1",
			"rxvision.preprocess: std: expected a number for each of 3 channels, got 2",
			"rxvision.preprocess: std: expected numbers above 0, got [1 0]",
			`rxvision.preprocess: input: expected the model's only input, got "x", and the model has "images"`,
			`rxvision.postprocess: activation: expected softmax or none, got "relu"`,
			`rxvision.postprocess: output: expected an output of the model, got "y", and the model has "logits"`,
		}},
		{model(KeyPreprocess, `{"input":"images","width":32,"height":28,"channels":1}`), []string{
			"rxvision.preprocess: the model's input has shape [-1 1 28 28], images have [-1 1 28 32]",
		}},
		{model(KeyPreprocess, `{"input":"images","width":28,"height":28,"channels":2}`), []string{"rxvision.preprocess: channels: expected 1 or 3, got 2"}},
	} {
		r, err := Parse(tc.m)
		if want := strings.Join(tc.want, "\n"); r != nil || err == nil || err.Error() != want {
			t.Errorf("got\n%v\nwant\n%s", err, want)
		}
	}
}

func encodePNG(im image.Image) []byte {
	var b bytes.Buffer
	if err := png.Encode(&b, im); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func encodeJPEG(im image.Image) []byte {
	var b bytes.Buffer
	if err := jpeg.Encode(&b, im, &jpeg.Options{Quality: 100}); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// pngHeader is a PNG that claims a size and has no pixels.
func pngHeader(w, h uint32) []byte {
	b := []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR")
	b = binary.BigEndian.AppendUint32(b, w)
	b = binary.BigEndian.AppendUint32(b, h)
	b = append(b, 8, 2, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b[12:]))
}

const tinyWebP = "RIFF\x1a\x00\x00\x00WEBPVP8L\x0d\x00\x00\x00\x2f\x00\x00\x00\x10\x07\x10\x11\x11\x88\x88\xfe\x07\x00"

func TestDecodeFaults(t *testing.T) {
	noise := image.NewGray(image.Rect(0, 0, 64, 64))
	for i := range noise.Pix {
		noise.Pix[i] = byte(i * i * 7 >> 3)
	}
	p, j := encodePNG(noise), encodeJPEG(noise)
	flipped := bytes.Clone(p)
	flipped[len(flipped)/2] ^= 1
	for _, tc := range []struct {
		name   string
		data   []byte
		status int
		want   string
	}{
		{"100 megapixels", pngHeader(10_000, 10_000), 413, "the image has 10000×10000 pixels, 100.0 million, at most 25.0 million are accepted"},
		{"more than can be counted", append(pngHeader(1<<31-1, 1<<31-1), "IEND\xaeB`\x82"...), 400, "the PNG image is broken: unsupported feature: dimension overflow"},
		{"a long strip", pngHeader(1<<31-1, 1), 413, "the image has 2147483647×1 pixels, 2147.5 million, at most 25.0 million are accepted"},
		{"header only", pngHeader(10, 10), 400, "the PNG image is truncated"},
		{"truncated PNG", p[:len(p)/2], 400, "the PNG image is truncated"},
		{"truncated JPEG", j[:len(j)/2], 400, "the JPEG image is truncated"},
		{"truncated JPEG header", j[:20], 400, "the JPEG image is truncated"},
		{"truncated WebP", []byte(tinyWebP)[:24], 400, "the WebP image is truncated"},
		{"flipped", flipped, 400, "the PNG image is broken: invalid format: zlib: invalid checksum"},
		{"empty", nil, 400, "the image is empty: expected a PNG, JPEG or WebP file"},
		{"GIF", []byte("GIF89a-and-more"), 415, `expected a PNG, JPEG or WebP file, got something that begins with "GIF89a-a"`},
		{"text", []byte("hi"), 415, `expected a PNG, JPEG or WebP file, got something that begins with "hi"`},
	} {
		im, err := Decode(tc.data, MaxPixels)
		if im != nil || err == nil || err.Error() != tc.want || oip.StatusOf(err) != tc.status {
			t.Errorf("%s: got %v (%d)\nwant %s (%d)", tc.name, err, oip.StatusOf(err), tc.want, tc.status)
		}
	}
	for name, data := range map[string][]byte{"PNG": p, "JPEG": j, "WebP": []byte(tinyWebP)} {
		if _, err := Decode(data, 64*64); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func mustDecode(t *testing.T, data []byte) *Image {
	t.Helper()
	im, err := Decode(data, MaxPixels)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func record(w, h, c int, change func(*Preprocess)) *Record {
	p := Preprocess{Input: "x", Width: w, Height: h, Channels: c, Layout: "NCHW", Scale: 1, Mean: make([]float64, c), Std: []float64{1, 1, 1}[:c], Resize: "stretch", Filter: "bilinear"}
	if change != nil {
		change(&p)
	}
	return &Record{Preprocess: p, Postprocess: Postprocess{"y", "softmax"}}
}

// values runs images through a record and gives the elements.
func values(t *testing.T, r *Record, images ...*Image) []float64 {
	t.Helper()
	tensor := r.Tensor(images...)
	v, err := tensor.Floats()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTensorIsExactWithoutScaling(t *testing.T) {
	grey := image.NewGray(image.Rect(0, 0, 3, 2))
	copy(grey.Pix, []byte{0, 1, 2, 100, 200, 255})
	r := record(3, 2, 1, func(p *Preprocess) { p.Scale, p.Mean, p.Std = 1.0/255, []float64{0.286}, []float64{0.353} })
	got := values(t, r, mustDecode(t, encodePNG(grey)))
	for i, v := range grey.Pix {
		if want := float64(float32((float64(v)/255 - 0.286) / 0.353)); got[i] != want {
			t.Errorf("pixel %d: got %v, want %v", i, got[i], want)
		}
	}

	colour := image.NewNRGBA(image.Rect(0, 0, 2, 1))
	colour.Set(0, 0, color.NRGBA{1, 2, 3, 255})
	colour.Set(1, 0, color.NRGBA{10, 20, 30, 0}) // transparent: black
	im := mustDecode(t, encodePNG(colour))
	if got := values(t, record(2, 1, 3, nil), im); !reflect.DeepEqual(got, []float64{1, 0, 2, 0, 3, 0}) {
		t.Errorf("NCHW: got %v", got)
	}
	nhwc := record(2, 1, 3, func(p *Preprocess) { p.Layout = "NHWC" })
	if got := values(t, nhwc, im, im); !reflect.DeepEqual(got, []float64{1, 2, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0}) {
		t.Errorf("NHWC, batch of two: got %v", got)
	}
	if tensor := nhwc.Tensor(im, im); !reflect.DeepEqual(tensor.Shape, []int64{2, 1, 2, 3}) {
		t.Errorf("shape %v", tensor.Shape)
	}
}

// stripes is an image of vertical stripes of one pixel value each.
func stripes(h int, values ...byte) *image.Gray {
	im := image.NewGray(image.Rect(0, 0, len(values), h))
	for y := range h {
		copy(im.Pix[y*im.Stride:], values)
	}
	return im
}

func TestResize(t *testing.T) {
	wide := mustDecode(t, encodePNG(stripes(2, 10, 20, 30, 40)))
	mode := func(m string) func(*Preprocess) {
		return func(p *Preprocess) { p.Resize, p.Filter = m, "nearest" }
	}
	for _, tc := range []struct {
		r    *Record
		want []float64
	}{
		{record(2, 2, 1, mode("crop")), []float64{20, 30, 20, 30}},
		{record(4, 4, 1, mode("pad")), []float64{0, 0, 0, 0, 10, 20, 30, 40, 10, 20, 30, 40, 0, 0, 0, 0}},
		{record(4, 1, 1, mode("stretch")), []float64{10, 20, 30, 40}},
		{record(2, 1, 1, nil), []float64{17, 32}}, // each pixel made of all that it covers
	} {
		got := values(t, tc.r, wide)
		if !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s %d×%d: got %v, want %v", tc.r.Preprocess.Resize, tc.r.Preprocess.Width, tc.r.Preprocess.Height, got, tc.want)
		}
	}
	thin := mustDecode(t, encodePNG(stripes(1, make([]byte, 3000)...)))
	for _, m := range []string{"crop", "pad", "stretch"} {
		values(t, record(2, 2, 1, mode(m)), thin) // sides of less than a pixel
	}
}

// withOrientation puts an EXIF orientation into a JPEG file.
func withOrientation(file []byte, o byte, order binary.AppendByteOrder) []byte {
	tiff := []byte("II*\x00")
	if order == binary.AppendByteOrder(binary.BigEndian) {
		tiff = []byte("MM\x00*")
	}
	tiff = order.AppendUint32(tiff, 8)
	tiff = order.AppendUint16(tiff, 2) // entries
	for _, entry := range [][3]uint16{{0x0100, 3, 7}, {0x0112, 3, uint16(o)}} {
		tiff = order.AppendUint16(tiff, entry[0])
		tiff = order.AppendUint16(tiff, entry[1])
		tiff = order.AppendUint32(tiff, 1)
		tiff = order.AppendUint16(tiff, entry[2])
		tiff = order.AppendUint16(tiff, 0)
	}
	exif := append([]byte("Exif\x00\x00"), tiff...)
	out := append(bytes.Clone(file[:2]), 0xff, 0xe1)
	out = binary.BigEndian.AppendUint16(out, uint16(len(exif)+2))
	return append(append(out, exif...), file[2:]...)
}

func TestOrientation(t *testing.T) {
	// As stored, in blocks of 16 pixels, which JPEG keeps apart: 0 100 200 / 50 150 250
	im := image.NewGray(image.Rect(0, 0, 48, 32))
	for y := range 32 {
		for x := range 48 {
			im.Pix[y*48+x] = byte(x/16*100 + y/16*50)
		}
	}
	file := encodeJPEG(im)
	for o, want := range map[byte][]float64{ // as seen, row by row
		1: {0, 100, 200, 50, 150, 250},
		2: {200, 100, 0, 250, 150, 50},
		3: {250, 150, 50, 200, 100, 0},
		4: {50, 150, 250, 0, 100, 200},
		5: {0, 50, 100, 150, 200, 250},
		6: {50, 0, 150, 100, 250, 200},
		7: {250, 200, 150, 100, 50, 0},
		8: {200, 250, 100, 150, 0, 50},
		9: {0, 100, 200, 50, 150, 250}, // no such orientation
	} {
		for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
			got := mustDecode(t, withOrientation(file, o, order))
			w, h := 3, 2
			if o >= 5 && o <= 8 {
				w, h = 2, 3
			}
			if gw, gh := got.Size(); gw != 16*w || gh != 16*h {
				t.Errorf("orientation %d: size %d×%d", o, gw, gh)
			}
			for i, v := range values(t, record(w, h, 1, func(p *Preprocess) { p.Filter = "nearest" }), got) {
				if math.Abs(v-want[i]) > 8 {
					t.Errorf("orientation %d: pixel %d is %v, want %v", o, i, v, want[i])
				}
			}
		}
	}
}

func TestClassify(t *testing.T) {
	r := record(1, 1, 1, nil)
	r.Labels = []string{"a", "b", "c"}
	out := []oip.Tensor{oip.FromFloat32("y", []int64{2, 3}, []float32{1000, 1001, 999, 0, 0, 0})}
	got, err := r.Classify(out, 2)
	if err != nil {
		t.Fatal(err)
	}
	e := 1 / (1 + math.Exp(-1) + math.Exp(-2))
	for i, want := range [][]Class{{{"b", e, 1}, {"a", e * math.Exp(-1), 0}}, {{"a", 1.0 / 3, 0}, {"b", 1.0 / 3, 1}}} {
		for k := range want {
			if g := got[i][k]; len(got[i]) != 2 || g.Label != want[k].Label || g.Index != want[k].Index || math.Abs(g.Probability-want[k].Probability) > 1e-12 {
				t.Errorf("image %d: got %+v, want %+v", i, got[i], want)
			}
		}
	}
	r.Labels, r.Postprocess.Activation = nil, "none"
	if got, err := r.Classify(out, 0); err != nil || !reflect.DeepEqual(got[0], []Class{{"1", 1001, 1}, {"0", 1000, 0}, {"2", 999, 2}}) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, tc := range []struct {
		out  []oip.Tensor
		want string
	}{
		{nil, `classify: the model's answer has no output "y"`},
		{[]oip.Tensor{oip.FromFloat32("y", []int64{1}, []float32{1})}, `classify: output "y": expected shape [N, 0], got [1]`},
		{[]oip.Tensor{oip.FromFloat32("y", []int64{1, 1}, []float32{float32(math.NaN())})}, `classify: output "y" holds NaN for image 0`},
		{[]oip.Tensor{{Name: "y", Datatype: oip.INT8, Shape: []int64{1, 1}, Data: []byte{1}}}, `classify: tensor "y": expected floating-point numbers, got INT8`},
	} {
		if _, err := r.Classify(tc.out, 1); err == nil || err.Error() != tc.want {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	im := image.NewGray(image.Rect(0, 0, 9, 7))
	f.Add(encodePNG(im))
	f.Add(withOrientation(encodeJPEG(im), 6, binary.BigEndian))
	f.Add([]byte(tinyWebP))
	if names, _ := filepath.Glob("../testdata/fashion/*.png"); len(names) > 0 {
		if b, err := os.ReadFile(names[0]); err == nil {
			f.Add(b)
		}
	}
	r := record(5, 4, 3, func(p *Preprocess) { p.Resize = "crop" })
	f.Fuzz(func(t *testing.T, data []byte) {
		im, err := Decode(data, 100_000)
		if err != nil {
			if s := oip.StatusOf(err); s != 400 && s != 413 && s != 415 {
				t.Fatalf("%v: %d", err, s)
			}
			return
		}
		tensor := r.Tensor(im)
		if err := tensor.Check(); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkTensor(b *testing.B) {
	im := image.NewGray(image.Rect(0, 0, 28, 28))
	file := encodePNG(im)
	r := record(28, 28, 1, nil)
	b.ReportAllocs()
	for b.Loop() {
		im, err := Decode(file, MaxPixels)
		if err != nil {
			b.Fatal(err)
		}
		r.Tensor(im)
	}
}
