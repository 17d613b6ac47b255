package gateway

import (
	"errors"
	"net/http"
	"strconv"

	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/vision"
)

// DefaultTopK is how many classes an answer names when the request does not say.
const DefaultTopK = 5

// Classification is the answer to POST /v1/models/{model}/classify: the most
// probable classes, best first.
type Classification struct {
	Model   string         `json:"model"`
	Version uint64         `json:"version"`
	Classes []vision.Class `json:"classes"`
}

// classify takes an image file as body, makes the model's input of it as the
// model's own metadata says, and answers labels with probabilities. Query:
// top_k.
func (g *Gateway) classify(c *request) (any, error) {
	topK := DefaultTopK
	if s := c.URL.Query().Get("top_k"); s != "" {
		var err error
		if topK, err = strconv.Atoi(s); err != nil || topK < 1 {
			return nil, oip.Errorf(400, "top_k is %q; want a whole number from 1", clip(s))
		}
	}
	body, release, err := g.body(c)
	if err != nil {
		return nil, err
	}
	defer release()
	leave, err := g.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if len(body) == 0 {
		return nil, oip.Errorf(400, "the body is empty; send a PNG, JPEG or WebP file")
	}
	image, err := g.decode(c, body)
	if err != nil {
		return nil, err
	}
	a, err := g.forward(c,
		func(v *version) error {
			if v.imagesErr != nil {
				return oip.Errorf(422, "model %q: what it says of images cannot be used: %v", c.model, v.imagesErr)
			}
			if v.images == nil {
				return oip.Errorf(422, "model %q takes no images: its file has no %q metadata", c.model, vision.KeyPreprocess)
			}
			return nil
		},
		func(v *version) (http.Header, [][]byte, error) {
			r := oip.Request{
				Inputs: []oip.Tensor{v.images.Tensor(image)}, BinaryOutput: true,
				Outputs: []oip.Output{{Name: v.images.Postprocess.Output, Binary: true}},
			}
			head, tail, err := r.Encode(nil, true)
			if err != nil {
				return nil, nil, err
			}
			h := http.Header{}
			h.Set("Content-Type", "application/octet-stream")
			h.Set(oip.HeaderLength, strconv.Itoa(len(head)))
			return h, append([][]byte{head}, tail...), nil
		})
	if err != nil {
		return nil, err
	}
	if a.status != http.StatusOK {
		return a, nil
	}
	n, err := oip.ParseHeaderLength(a.header)
	if err != nil {
		return nil, err
	}
	resp, err := oip.DecodeResponse(a.body, n)
	if err != nil {
		return nil, oip.Errorf(502, "the replica's answer cannot be read: %v", err)
	}
	classes, err := a.version.images.Classify(resp.Outputs, topK)
	if err != nil || len(classes) != 1 {
		return nil, oip.Errorf(502, "the model's answer is no classification: %v", errors.Join(err))
	}
	return Classification{Model: c.model, Version: a.version.number, Classes: classes[0]}, nil
}

// decode decodes one image; few at a time, since each may take much memory.
func (g *Gateway) decode(c *request, body []byte) (*vision.Image, error) {
	select {
	case g.decodes <- struct{}{}:
		defer func() { <-g.decodes }()
	case <-c.Context().Done():
		return nil, c.Context().Err()
	}
	return vision.Decode(body, vision.MaxPixels)
}
