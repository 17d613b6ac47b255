package api_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func (w *wire) models() *api.Client {
	w.Helper()
	c, err := api.NewClient(w.url, "", nil)
	if err != nil {
		w.Fatal(err)
	}
	return c
}

func TestModels(t *testing.T) {
	ctx := context.Background()
	w := newWire(t)
	c := w.models()
	data := bytes.Repeat([]byte("onnx"), 100_000)
	var told []int64
	v, err := c.Push(ctx, "fashion", api.About{Description: "shoes & shirts"}, bytes.NewReader(data), int64(len(data)), func(sent, size int64) {
		told = append(told, sent)
		if size != int64(len(data)) {
			t.Errorf("progress of %d bytes", size)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if v.Version != 1 || v.Size != int64(len(data)) || v.Platform != "onnxruntime_onnx" || v.Inputs[0].Shape[0] != -1 || len(told) == 0 || told[len(told)-1] != v.Size {
		t.Errorf("%+v, progress %v", v, told)
	}
	if again, err := c.Push(ctx, "fashion", api.About{}, bytes.NewReader(data), int64(len(data)), nil); err != nil || again.Version != 1 {
		t.Errorf("the same bytes: %+v, %v", again, err)
	}
	two, err := c.Push(ctx, "fashion", api.About{}, strings.NewReader("two"), 3, nil)
	if err != nil || two.Version != 2 {
		t.Fatalf("%+v, %v", two, err)
	}
	if err := c.SetAlias(ctx, "fashion", "production", 1); err != nil {
		t.Error(err)
	}
	list, err := c.Models(ctx)
	if err != nil || len(list) != 1 || list[0].LatestVersion != 2 || list[0].Aliases["production"] != 1 || list[0].Description != "shoes & shirts" {
		t.Errorf("%s, %v", pretty(t, list), err)
	}
	m, err := c.Model(ctx, "fashion")
	if err != nil || m.Name != "fashion" || len(m.Versions) != 2 || m.Versions[0].Version != 2 {
		t.Errorf("%s, %v", pretty(t, m), err)
	}
	if got, err := c.ModelVersion(ctx, "fashion", 1); err != nil || got.Digest != v.Digest {
		t.Errorf("%+v, %v", got, err)
	}
	body, size, err := c.Artifact(ctx, v.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if b, err := io.ReadAll(body); err != nil || !bytes.Equal(b, data) || size != v.Size {
		t.Errorf("artifact of %d bytes, %d read, %v", size, len(b), err)
	}
	if err := c.DeleteAlias(ctx, "fashion", "production"); err != nil || len(w.store.State().Snapshot().Model(nil, "fashion").Aliases) != 0 {
		t.Errorf("delete: %v", err)
	}
}

// The client gets the error that the server had: code and text.
func TestClientErrors(t *testing.T) {
	ctx := context.Background()
	w := newWire(t)
	c := w.models()
	if _, err := c.Push(ctx, "fashion", api.About{}, strings.NewReader("one"), 3, nil); err != nil {
		t.Fatal(err)
	}
	if r := w.submit(onnxJob("vision", "fashion"), "", nil); r.status != 200 {
		t.Fatal(r.body)
	}
	if err := c.SetAlias(ctx, "fashion", "production", 1); err != nil {
		t.Fatal(err)
	}
	if r := w.submit(onnxJob("follower", "fashion@production"), "", nil); r.status != 200 {
		t.Fatal(r.body)
	}
	push := func(name, data string) error {
		_, err := c.Push(ctx, name, api.About{}, strings.NewReader(data), int64(len(data)), nil)
		return err
	}
	_, missing := c.Model(ctx, "nosuch")
	_, version := c.ModelVersion(ctx, "fashion", 9)
	_, _, artifact := c.Artifact(ctx, "sha256:00")
	for _, e := range []struct {
		what string
		err  error
		code cluster.Code
		text string
	}{
		{"missing model", missing, cluster.CodeNotFound, `model "nosuch" is not registered`},
		{"missing version", version, cluster.CodeNotFound, `model "fashion" has no version 9`},
		{"missing artifact", artifact, cluster.CodeNotFound, "no artifact sha256:00"},
		{"bad model", push("fashion", "bad"), cluster.CodeInvalid, "the file is no ONNX model"},
		{"bad name", push("-x", "one"), cluster.CodeInvalid, cluster.ValidModelName("-x").Error()},
		{"alias of nothing", c.SetAlias(ctx, "fashion", "production", 9), cluster.CodeNotFound, `model "fashion" has no version 9; the newest is 1`},
		{
			"alias in use", c.DeleteAlias(ctx, "fashion", "production"), cluster.CodeConflict,
			`alias "production" of model "fashion" is followed by job "follower": stop the job or point it elsewhere first`,
		},
	} {
		var got *cluster.Error
		if !errors.As(e.err, &got) || got.Code != e.code || got.Text != e.text {
			t.Errorf("%s: %v (code %q), want %s (code %q)", e.what, e.err, cluster.CodeOf(e.err), e.text, e.code)
		}
	}
	w.store.lead("")
	if err := push("fashion", "two"); !errors.Is(err, cluster.ErrNoLeader) {
		t.Errorf("without a leader: %v", err)
	}
	for _, addr := range []string{"", "127.0.0.1:7646", "ftp://x", "http://", "::"} {
		if _, err := api.NewClient(addr, "", nil); cluster.CodeOf(err) != cluster.CodeInvalid {
			t.Errorf("address %q: %v", addr, err)
		}
	}
}

// TestPushNamesItsOrigin: who made a model is verified before its bytes are taken, and
// told to who reads it.
func TestPushNamesItsOrigin(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("train")
	w.alloc(allocID(1), "train", gpuNode, "")
	c, ctx := w.models(), t.Context()
	v, err := c.Push(ctx, "m", api.About{AllocID: allocID(1)}, strings.NewReader("one"), 3, nil)
	if err != nil {
		t.Fatal(err)
	}
	a := w.store.State().Snapshot().Alloc(nil, allocID(1))
	want := cluster.ModelOrigin{Namespace: "default", JobID: "train", JobVersion: a.JobVersion, AllocID: a.ID, EvalID: a.EvalID}
	if v.Origin == nil || *v.Origin != want {
		t.Errorf("origin %+v, want %+v", v.Origin, want)
	}
	if v, err = c.Push(ctx, "m", api.About{JobID: "train"}, strings.NewReader("two"), 3, nil); err != nil || v.Origin == nil || v.Origin.JobID != "train" || v.Origin.AllocID != "" {
		t.Errorf("%+v, %v", v, err)
	}
	for _, about := range []api.About{{AllocID: allocID(2)}, {JobID: "nope"}, {JobID: "train", Namespace: "other"}} {
		read := false
		body := readerFunc(func(p []byte) (int, error) { read = true; clear(p); return len(p), nil })
		if _, err := c.Push(ctx, "m", about, body, 1<<40, nil); cluster.CodeOf(err) != cluster.CodeNotFound || read {
			t.Errorf("%+v: %v, read %t", about, err, read)
		}
	}
}

// A refused upload answers before the bytes are sent.
func TestRefusedPushReadsNothing(t *testing.T) {
	w := newWire(t)
	read := false
	body := readerFunc(func(p []byte) (int, error) {
		read = true
		clear(p)
		return len(p), nil
	})
	_, err := w.models().Push(context.Background(), "-bad-name", api.About{}, body, 1<<40, nil)
	if cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("%v", err)
	}
	if read {
		t.Error("bytes were sent to a server that had refused them")
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestArtifactRanges(t *testing.T) {
	w := newWire(t)
	v := w.model("m", "0123456789")
	path := "/v1/artifacts/" + v.Digest
	etag := `"` + v.Digest + `"`
	for _, c := range []struct {
		header []string
		status int
		body   string
		ranged string
	}{
		{nil, 200, "0123456789", ""},
		{[]string{"Range", "bytes=3-5"}, 206, "345", "bytes 3-5/10"},
		{[]string{"Range", "bytes=7-"}, 206, "789", "bytes 7-9/10"},
		{[]string{"Range", "bytes=-2"}, 206, "89", "bytes 8-9/10"},
		{[]string{"Range", "bytes=-99"}, 206, "0123456789", "bytes 0-9/10"},
		{[]string{"Range", "bytes=0-99"}, 206, "0123456789", "bytes 0-9/10"},
		{[]string{"Range", "bytes=10-"}, 416, "the artifact has 10 bytes", ""},
		{[]string{"Range", "bytes=5-2"}, 200, "0123456789", ""},
		{[]string{"Range", "bytes=0-1,4-5"}, 200, "0123456789", ""},
		{[]string{"Range", "lines=1-2"}, 200, "0123456789", ""},
		{[]string{"Range", "bytes=3-5", "If-Range", etag}, 206, "345", "bytes 3-5/10"},
		{[]string{"Range", "bytes=3-5", "If-Range", `"other"`}, 200, "0123456789", ""},
	} {
		r := w.do(http.MethodGet, path, "", c.header...)
		if r.status != c.status || r.body != c.body || r.header.Get("Content-Range") != c.ranged {
			t.Errorf("%v: %d %q %q", c.header, r.status, r.body, r.header.Get("Content-Range"))
		}
	}
	if got := w.get(path).header.Get("ETag"); got != etag {
		t.Errorf("ETag %s", got)
	}
}

// A model's page waits for its next version as jobs do.
func TestBlockingQueryOfModels(t *testing.T) {
	w := newWire(t)
	w.model("m", "one")
	ch := w.later("/v1/models/m?index=1")
	w.blocked(1)
	w.model("m", "two")
	var m api.ModelInfo
	w.decoded(<-ch, &m)
	if m.LatestVersion != 2 || len(m.Versions) != 2 {
		t.Errorf("%+v", m)
	}
}
