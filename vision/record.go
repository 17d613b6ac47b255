// Package vision turns image files into the tensor that a model wants, and the model's answer into labels. What the model
// wants stands in the custom metadata of the model file itself, under three keys:
//
//	rxvision.preprocess   {"input":"images","width":28,"height":28,"channels":1,"layout":"NCHW",
//	                       "scale":0.00392156862745098,"mean":[0.286],"std":[0.353],
//	                       "resize":"stretch","filter":"bilinear"}
//	rxvision.postprocess  {"output":"logits","activation":"softmax"}
//	rxvision.labels       ["T-shirt/top","Trouser",…]
//
// An element of the tensor is (pixel·scale − mean) / std with pixel from 0 to 255, per channel. Transparent pixels lie over
// black. One channel is the luma of ITU-R BT.601. A model without rxvision.preprocess takes no images.
package vision

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/oip"
)

// The keys of the model's custom metadata.
const (
	KeyPreprocess  = "rxvision.preprocess"
	KeyPostprocess = "rxvision.postprocess"
	KeyLabels      = "rxvision.labels"
)

// Limits of a record.
const (
	maxSide   = 8192
	maxLabels = 100_000
)

// Preprocess says how an image becomes the model's input.
type Preprocess struct {
	Input         string
	Width, Height int       // pixels
	Channels      int       // 1: grey, 3: red, green, blue
	Layout        string    // "NCHW" (default) or "NHWC"
	Scale         float64   // default 1
	Mean, Std     []float64 // one per channel; default 0 and 1
	// Resize is "stretch" (default: both sides on their own), "crop" (fill the tensor, cut the middle out of the longer
	// side) or "pad" (fit whole, black around).
	Resize string
	Filter string // "bilinear" (default), "bicubic" or "nearest"
}

// Postprocess says how the model's output becomes probabilities.
type Postprocess struct {
	Output     string // [N, classes]
	Activation string // "softmax" (default) or "none"
}

// Record is all that a model says about images.
type Record struct {
	Preprocess  Preprocess
	Postprocess Postprocess
	Labels      []string // empty: classes are named by their number
}

// Parse reads the record out of a model's properties and checks it against the model's inputs and outputs. A model without
// any of the keys gives nil. Faults are all reported at once, each as "key: field: fault".
func Parse(m oip.ModelMetadata) (*Record, error) {
	p := parser{}
	r := &Record{
		Preprocess:  Preprocess{Layout: "NCHW", Scale: 1, Resize: "stretch", Filter: "bilinear"},
		Postprocess: Postprocess{Activation: "softmax"},
	}
	pre, hasPre := m.Properties[KeyPreprocess]
	post, hasPost := m.Properties[KeyPostprocess]
	labels, hasLabels := m.Properties[KeyLabels]
	if !hasPre && !hasPost && !hasLabels {
		return nil, nil
	}
	if !hasPre {
		p.fault(KeyPreprocess, "is missing, but other keys for images are there")
	} else if to := &r.Preprocess; p.object(KeyPreprocess, pre, map[string]any{
		"input": &to.Input, "width": &to.Width, "height": &to.Height, "channels": &to.Channels, "layout": &to.Layout,
		"scale": &to.Scale, "mean": &to.Mean, "std": &to.Std, "resize": &to.Resize, "filter": &to.Filter,
	}, "input", "width", "height", "channels") {
		p.preprocess(to, m.Inputs)
	}
	if hasLabels {
		if err := json.Unmarshal([]byte(labels), &r.Labels); err != nil {
			p.fault(KeyLabels, "expected a JSON array of strings")
		} else if len(r.Labels) == 0 || len(r.Labels) > maxLabels {
			p.fault(KeyLabels, "expected 1 to %d labels, got %d", maxLabels, len(r.Labels))
		} else if i := slices.Index(r.Labels, ""); i >= 0 {
			p.fault(KeyLabels, "label %d is empty", i)
		}
	}
	if !hasPost {
		p.fault(KeyPostprocess, "is missing")
	} else if to := &r.Postprocess; p.object(KeyPostprocess, post, map[string]any{
		"output": &to.Output, "activation": &to.Activation,
	}, "output") {
		p.postprocess(to, r.Labels, m.Outputs)
	}
	if err := errors.Join(p.faults...); err != nil {
		return nil, err
	}
	return r, nil
}

// parser collects faults.
type parser struct{ faults []error }

func (p *parser) fault(key, format string, args ...any) {
	p.faults = append(p.faults, fmt.Errorf("%s: "+format, append([]any{key}, args...)...))
}

// object reads the fields of a JSON object, of which some are required and no others are known, and says whether all was
// well.
func (p *parser) object(key, text string, fields map[string]any, required ...string) bool {
	before := len(p.faults)
	var raw map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &raw); err != nil || raw == nil {
		p.fault(key, "expected a JSON object")
		return false
	}
	for _, name := range slices.Sorted(maps.Keys(raw)) {
		to, known := fields[name]
		if !known {
			p.fault(key, "%s: unknown field, expected one of %s", name, strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
		} else if bytes.Equal(raw[name], []byte("null")) || json.Unmarshal(raw[name], to) != nil {
			p.fault(key, "%s: expected %s, got %.40s", name, kindOf(to), raw[name])
		}
	}
	for _, name := range required {
		if _, ok := raw[name]; !ok {
			p.fault(key, "%s: is missing", name)
		}
	}
	return len(p.faults) == before
}

func kindOf(to any) string {
	switch to.(type) {
	case *string:
		return "a string"
	case *int:
		return "an integer"
	case *float64:
		return "a number"
	}
	return "an array of numbers"
}

func (p *parser) oneOf(key, field, got string, choices ...string) {
	if !slices.Contains(choices, got) {
		p.fault(key, "%s: expected %s, got %q", field, strings.Join(choices, " or "), got)
	}
}

func (p *parser) preprocess(r *Preprocess, inputs []oip.TensorMetadata) {
	const key = KeyPreprocess
	for _, side := range []struct {
		name string
		size int
	}{{"width", r.Width}, {"height", r.Height}} {
		if side.size < 1 || side.size > maxSide {
			p.fault(key, "%s: expected 1 to %d pixels, got %d", side.name, maxSide, side.size)
		}
	}
	if r.Channels != 1 && r.Channels != 3 {
		p.fault(key, "channels: expected 1 or 3, got %d", r.Channels)
		return
	}
	p.oneOf(key, "layout", r.Layout, "NCHW", "NHWC")
	p.oneOf(key, "resize", r.Resize, "stretch", "crop", "pad")
	p.oneOf(key, "filter", r.Filter, "bilinear", "bicubic", "nearest")
	if r.Scale == 0 {
		p.fault(key, "scale: expected a number other than 0")
	}
	if r.Mean == nil {
		r.Mean = make([]float64, r.Channels)
	}
	if r.Std == nil {
		r.Std = slices.Repeat([]float64{1}, r.Channels)
	}
	if len(r.Mean) != r.Channels {
		p.fault(key, "mean: expected a number for each of %d channels, got %d", r.Channels, len(r.Mean))
	}
	if len(r.Std) != r.Channels {
		p.fault(key, "std: expected a number for each of %d channels, got %d", r.Channels, len(r.Std))
	}
	if slices.ContainsFunc(r.Std, func(v float64) bool { return v <= 0 }) {
		p.fault(key, "std: expected numbers above 0, got %v", r.Std)
	}
	if len(inputs) != 1 || inputs[0].Name != r.Input {
		p.fault(key, "input: expected the model's only input, got %q, and the model has %s", r.Input, names(inputs))
		return
	}
	want := r.shape(-1)
	if in := inputs[0]; in.Datatype != oip.FP32 {
		p.fault(key, "input: expected a model input of FP32, got %s", in.Datatype)
	} else if len(in.Shape) > 0 && !fits(want, in.Shape) {
		p.fault(key, "the model's input has shape %v, images have %v", in.Shape, want)
	}
}

func (p *parser) postprocess(r *Postprocess, labels []string, outputs []oip.TensorMetadata) {
	const key = KeyPostprocess
	p.oneOf(key, "activation", r.Activation, "softmax", "none")
	i := slices.IndexFunc(outputs, func(o oip.TensorMetadata) bool { return o.Name == r.Output })
	if i < 0 {
		p.fault(key, "output: expected an output of the model, got %q, and the model has %s", r.Output, names(outputs))
		return
	}
	switch out := outputs[i]; {
	case out.Datatype != oip.FP32 && out.Datatype != oip.FP64 && out.Datatype != oip.FP16 && out.Datatype != oip.BF16:
		p.fault(key, "output: expected floating-point numbers, got %s", out.Datatype)
	case len(out.Shape) != 0 && len(out.Shape) != 2:
		p.fault(key, "output: expected shape [N, classes], got %v", out.Shape)
	case len(out.Shape) == 2 && out.Shape[1] >= 0 && len(labels) > 0 && out.Shape[1] != int64(len(labels)):
		p.fault(KeyLabels, "the model has %d classes, got %d labels", out.Shape[1], len(labels))
	}
}

// shape is the shape of the tensor of n images.
func (p *Preprocess) shape(n int64) []int64 {
	c, h, w := int64(p.Channels), int64(p.Height), int64(p.Width)
	if p.Layout == "NHWC" {
		return []int64{n, h, w, c}
	}
	return []int64{n, c, h, w}
}

// WarmUp is an input of the model that is valid for certain: one black image.
func (r *Record) WarmUp() oip.Tensor {
	shape := r.Preprocess.shape(1)
	return oip.FromFloat32(r.Preprocess.Input, shape, make([]float32, shape[1]*shape[2]*shape[3]))
}

func fits(want, shape []int64) bool {
	return slices.EqualFunc(want, shape, func(a, b int64) bool { return a < 0 || b < 0 || a == b })
}

func names(tensors []oip.TensorMetadata) string {
	quoted := make([]string, len(tensors))
	for i, t := range tensors {
		quoted[i] = fmt.Sprintf("%q", t.Name)
	}
	return strings.Join(quoted, ", ")
}

// Class is one label of an answer.
type Class struct {
	Label       string  `json:"label"`
	Probability float64 `json:"probability"`
	Index       int     `json:"index"`
}

// Classify gives for each image of a batch the topK most probable classes, best first; topK below 1 means all.
func (r *Record) Classify(outputs []oip.Tensor, topK int) ([][]Class, error) {
	i := slices.IndexFunc(outputs, func(t oip.Tensor) bool { return t.Name == r.Postprocess.Output })
	if i < 0 {
		return nil, fmt.Errorf("classify: the model's answer has no output %q", r.Postprocess.Output)
	}
	t := &outputs[i]
	values, err := t.Floats()
	if err != nil {
		return nil, fmt.Errorf("classify: %w", err)
	}
	if len(t.Shape) != 2 || t.Shape[1] == 0 || len(r.Labels) > 0 && t.Shape[1] != int64(len(r.Labels)) {
		return nil, fmt.Errorf("classify: output %q: expected shape [N, %d], got %v", t.Name, len(r.Labels), t.Shape)
	}
	n := int(t.Shape[1])
	if topK < 1 || topK > n {
		topK = n
	}
	answers := make([][]Class, t.Shape[0])
	for i := range answers {
		row := values[i*n : (i+1)*n]
		if slices.ContainsFunc(row, math.IsNaN) {
			return nil, fmt.Errorf("classify: output %q holds NaN for image %d", t.Name, i)
		}
		if r.Postprocess.Activation == "softmax" {
			softmax(row)
		}
		classes := make([]Class, n)
		for k, v := range row {
			classes[k] = Class{Probability: v, Index: k, Label: fmt.Sprint(k)}
			if len(r.Labels) > 0 {
				classes[k].Label = r.Labels[k]
			}
		}
		slices.SortStableFunc(classes, func(a, b Class) int {
			switch {
			case a.Probability > b.Probability:
				return -1
			case a.Probability < b.Probability:
				return 1
			}
			return 0
		})
		answers[i] = classes[:topK:topK]
	}
	return answers, nil
}

// softmax replaces logits by probabilities; the largest is taken off first, so that no power overflows.
func softmax(row []float64) {
	top, sum := slices.Max(row), 0.0
	for i, v := range row {
		row[i] = math.Exp(v - top)
		if v == top {
			row[i] = 1 // also for an infinite one
		}
		sum += row[i]
	}
	for i := range row {
		row[i] /= sum
	}
}
