package api

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
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// maxErrorText bounds what a Client reads of an error's text, in bytes.
const maxErrorText = 64 << 10

// Client speaks to a server: models, aliases, artifacts, and of Nomad's routes those
// that `rxvision job` needs. For the rest use github.com/hashicorp/nomad/api.
type Client struct {
	addr  string
	token string
	http  *http.Client
}

// NewClient makes a client of the server at addr, such as http://127.0.0.1:7646.
// token may be empty; client nil means http.DefaultClient.
func NewClient(addr, token string, client *http.Client) (*Client, error) {
	u, err := url.Parse(addr)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, cluster.Errorf(cluster.CodeInvalid, "address %q: use the form http://HOST:PORT", addr)
	}
	if client == nil {
		client = http.DefaultClient
	}
	return &Client{addr: u.Scheme + "://" + u.Host, token: token, http: client}, nil
}

// do sends a request and gives the answer of a 2xx; other answers become the
// *cluster.Error that the server had.
func (c *Client) do(ctx context.Context, method string, path []string, query url.Values, body io.Reader, size int64) (*http.Response, error) {
	for i, step := range path {
		path[i] = url.PathEscape(step)
	}
	target := c.addr + "/v1/" + strings.Join(path, "/")
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = size
	}
	if c.token != "" {
		req.Header.Set("X-Nomad-Token", c.token)
	}
	if size > MaxBody { // a refusal shall come before the bytes go
		req.Header.Set("Expect", "100-continue")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("server %s: %w", c.addr, reason(err))
	}
	if res.StatusCode >= 200 && res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxErrorText))
	if err != nil {
		return nil, fmt.Errorf("server %s: status %d: %w", c.addr, res.StatusCode, err)
	}
	code := cluster.Code(res.Header.Get(codeHeader))
	if code == "" {
		code = codeOf(res.StatusCode)
	}
	if len(text) == 0 {
		text = []byte(res.Status)
	}
	return nil, &cluster.Error{Code: code, Text: string(text)}
}

// reason drops what an error of net/http repeats of the request.
func reason(err error) error {
	var whole *url.Error
	if errors.As(err, &whole) {
		err = whole.Err
	}
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return fmt.Errorf("it cannot be reached; is it running? %w", errors.Unwrap(dial))
	}
	return err
}

// call is do with JSON both ways; in and out may be nil.
func (c *Client) call(ctx context.Context, method string, path []string, in, out any) error {
	var body io.Reader
	var size int64
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body, size = bytes.NewReader(b), int64(len(b))
	}
	res, err := c.do(ctx, method, path, nil, body, size)
	if err != nil {
		return err
	}
	return answered(res, out)
}

func answered(res *http.Response, out any) error {
	defer res.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(res.Body).Decode(out); err != nil {
		return fmt.Errorf("answer of %s: %w", res.Request.URL.Path, err)
	}
	return nil
}

// About is what a push says of a model besides its bytes. JobID and AllocID name the
// work that made it, in Namespace ("": default): what they name is kept for as long as
// the version.
type About struct {
	Description               string
	Namespace, JobID, AllocID string
}

// Push sends an ONNX file as the next version of a model and gives the version
// that the server made of it, or found with the same bytes. size is the number of
// bytes in body. progress, when not nil, is told how many have been sent.
func (c *Client) Push(ctx context.Context, model string, about About, body io.Reader, size int64, progress func(sent, size int64)) (*cluster.ModelVersion, error) {
	if err := cluster.ValidModelName(model); err != nil {
		return nil, err // some names would not even reach the server's check: they are part of a path
	}
	if progress != nil {
		body = &counted{body: body, size: size, tell: progress}
	}
	query := url.Values{}
	for name, value := range map[string]string{
		"description": about.Description, "namespace": about.Namespace, "job": about.JobID, "alloc": about.AllocID,
	} {
		if value != "" {
			query.Set(name, value)
		}
	}
	res, err := c.do(ctx, http.MethodPut, []string{"models", model}, query, io.LimitReader(body, size), size)
	if err != nil {
		return nil, err
	}
	v := new(cluster.ModelVersion)
	return v, answered(res, v)
}

type counted struct {
	body       io.Reader
	sent, size int64
	tell       func(sent, size int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.body.Read(p)
	if n > 0 {
		c.sent += int64(n)
		c.tell(c.sent, c.size)
	}
	return n, err
}

// Models lists all models by name.
func (c *Client) Models(ctx context.Context) ([]*cluster.Model, error) {
	var out []*cluster.Model
	return out, c.call(ctx, http.MethodGet, []string{"models"}, nil, &out)
}

// Model gives a model with its versions, newest first.
func (c *Client) Model(ctx context.Context, name string) (*ModelInfo, error) {
	if err := cluster.ValidModelName(name); err != nil {
		return nil, err
	}
	out := new(ModelInfo)
	if err := c.call(ctx, http.MethodGet, []string{"models", name}, nil, out); err != nil {
		return nil, err
	}
	return out, nil
}

// ModelVersion gives one version of a model.
func (c *Client) ModelVersion(ctx context.Context, name string, version uint64) (*cluster.ModelVersion, error) {
	out := new(cluster.ModelVersion)
	if err := c.call(ctx, http.MethodGet, []string{"models", name, "versions", fmt.Sprint(version)}, nil, out); err != nil {
		return nil, err
	}
	return out, nil
}

// SetAlias points an alias of a model at a version. Jobs that follow the alias are
// rolled to it.
func (c *Client) SetAlias(ctx context.Context, name, alias string, version uint64) error {
	in := struct{ Version uint64 }{version}
	return c.call(ctx, http.MethodPut, []string{"models", name, "alias", alias}, in, nil)
}

// DeleteAlias removes an alias; one that a job follows is refused.
func (c *Client) DeleteAlias(ctx context.Context, name, alias string) error {
	return c.call(ctx, http.MethodDelete, []string{"models", name, "alias", alias}, nil, nil)
}

// Artifact gives the bytes of an artifact. The caller closes them and checks the
// digest.
func (c *Client) Artifact(ctx context.Context, digest string) (io.ReadCloser, int64, error) {
	res, err := c.do(ctx, http.MethodGet, []string{"artifacts", digest}, nil, nil, 0)
	if err != nil {
		return nil, 0, err
	}
	return res.Body, res.ContentLength, nil
}
