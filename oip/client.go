package oip

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Limits of the answers that a Client reads.
const (
	maxResponse = 1 << 30
	maxMetadata = 16 << 20
	trusted     = 64 << 20 // what is allocated because a Content-Length says so
)

// Client asks one server. Answers that are not a success come back as *Error, with the server's status and message.
type Client struct {
	BaseURL string       // for example http://127.0.0.1:8080, without /v2
	HTTP    *http.Client // nil means http.DefaultClient
}

// Live is nil when the server is alive.
func (c *Client) Live(ctx context.Context) error { return c.get(ctx, "/v2/health/live", nil) }

// Ready is nil when the server is ready for inference.
func (c *Client) Ready(ctx context.Context) error { return c.get(ctx, "/v2/health/ready", nil) }

// ModelReady is nil when the model is ready for inference; an empty version leaves the choice to the server.
func (c *Client) ModelReady(ctx context.Context, model, version string) error {
	return c.get(ctx, modelPath(model, version)+"/ready", nil)
}

// Server describes the server.
func (c *Client) Server(ctx context.Context) (m ServerMetadata, err error) {
	err = c.get(ctx, "/v2", &m)
	return m, err
}

// Metadata describes the model; an empty version leaves the choice to the server.
func (c *Client) Metadata(ctx context.Context, model, version string) (m ModelMetadata, err error) {
	err = c.get(ctx, modelPath(model, version), &m)
	return m, err
}

// Infer runs the model on the request's inputs, which travel as binary data if binary is true and as JSON otherwise.
// How the outputs travel is said by the request.
func (c *Client) Infer(ctx context.Context, model, version string, r *Request, binary bool) (*Response, error) {
	head, tail, err := r.Encode(nil, binary)
	if err != nil {
		return nil, err
	}
	length := int64(len(head))
	for _, b := range tail {
		length += int64(len(b))
	}
	body := func() (io.ReadCloser, error) {
		parts := append(net.Buffers{head}, tail...)
		return io.NopCloser(&parts), nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url(modelPath(model, version)+"/infer"), nil)
	if err != nil {
		return nil, fmt.Errorf("infer: %w", err)
	}
	req.ContentLength, req.GetBody = length, body
	req.Body, _ = body()
	req.Header.Set("Content-Type", "application/json")
	if tail != nil {
		req.Header.Set("Content-Type", "application/octet-stream")
		req.Header.Set(HeaderLength, strconv.Itoa(len(head)))
	}
	answer, header, err := c.do(req, maxResponse)
	if err != nil {
		return nil, err
	}
	headerLen, err := ParseHeaderLength(header)
	if err != nil {
		return nil, err
	}
	resp, err := DecodeResponse(answer, headerLen)
	if err != nil {
		return nil, fmt.Errorf("answer of %s: %w", c.BaseURL, err)
	}
	return resp, nil
}

// ParseHeaderLength gives the value of the HeaderLength header, -1 when there is none.
func ParseHeaderLength(h http.Header) (int, error) {
	v := h.Get(HeaderLength)
	if v == "" {
		return -1, nil
	}
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return 0, badf("%s: expected a number of bytes, got %s", HeaderLength, quote(v))
	}
	return int(n), nil
}

func modelPath(model, version string) string {
	p := "/v2/models/" + url.PathEscape(model)
	if version != "" {
		p += "/versions/" + url.PathEscape(version)
	}
	return p
}

func (c *Client) url(path string) string { return strings.TrimSuffix(c.BaseURL, "/") + path }

// get asks for a path and decodes the answer's JSON into out, unless that is nil.
func (c *Client) get(ctx context.Context, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url(path), nil)
	if err != nil {
		return err
	}
	body, _, err := c.do(req, maxMetadata)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("answer of %s: %w", req.URL, err)
	}
	return nil
}

// do sends a request and reads an answer of at most limit bytes.
func (c *Client) do(req *http.Request, limit int64) ([]byte, http.Header, error) {
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.ContentLength > limit {
		return nil, nil, fmt.Errorf("answer of %s: %d bytes, at most %d are read", req.URL, resp.ContentLength, limit)
	}
	var buf bytes.Buffer
	if resp.ContentLength > 0 {
		buf.Grow(int(min(resp.ContentLength, trusted)) + bytes.MinRead)
	}
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, nil, fmt.Errorf("answer of %s: %w", req.URL, err)
	}
	if n > limit {
		return nil, nil, fmt.Errorf("answer of %s: more than %d bytes", req.URL, limit)
	}
	if resp.StatusCode/100 != 2 {
		return nil, nil, answerError(resp, buf.Bytes())
	}
	return buf.Bytes(), resp.Header, nil
}

// answerError is what an answer that is no success says.
func answerError(resp *http.Response, body []byte) error {
	var e ErrorResponse
	if err := json.Unmarshal(body, &e); err != nil || e.Error == "" {
		e.Error = resp.Status
		if text := strings.TrimSpace(string(body)); text != "" {
			e.Error += ": " + clip(text, 512)
		}
	}
	return &Error{Status: resp.StatusCode, Message: e.Error}
}

// StatusOf is the HTTP status that an error from this package carries, or 0.
func StatusOf(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}
