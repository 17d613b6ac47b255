package api

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// SaveSnapshot writes an archive of the state to w and gives its length in bytes.
// With stale any server answers, else the leader. The bytes are compared with the
// checksum that the server sends ahead; after an error, what is in w is no
// archive. progress, when not nil, is told how much has come.
func (c *Client) SaveSnapshot(ctx context.Context, stale bool, w io.Writer, progress func(done, size int64)) (int64, error) {
	query := url.Values{}
	if stale {
		query.Set("stale", "true")
	}
	res, err := c.do(ctx, http.MethodGet, []string{"operator", "snapshot"}, query, nil, 0)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	want, ok := strings.CutPrefix(res.Header.Get("Digest"), "sha-256=")
	if !ok || res.ContentLength < 0 {
		return 0, cluster.Errorf(cluster.CodeInvalid, "the answer of %s has no checksum or length: it is no snapshot", c.addr)
	}
	body := io.Reader(res.Body)
	if progress != nil {
		body = &counted{body: body, size: res.ContentLength, tell: progress}
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, sum), body)
	switch got := base64.StdEncoding.EncodeToString(sum.Sum(nil)); {
	case err != nil:
		return n, fmt.Errorf("after %d of %d bytes: %w", n, res.ContentLength, err)
	case got != want:
		return n, cluster.Errorf(cluster.CodeInvalid, "the snapshot was damaged on its way: SHA-256 %s, want %s", got, want)
	}
	return n, nil
}

// RestoreSnapshot replaces the whole state by an archive's. The server verifies
// all of it before it changes anything. progress, when not nil, is told how many
// bytes have been sent.
func (c *Client) RestoreSnapshot(ctx context.Context, archive io.Reader, size int64, progress func(sent, size int64)) error {
	if progress != nil {
		archive = &counted{body: archive, size: size, tell: progress}
	}
	res, err := c.do(ctx, http.MethodPut, []string{"operator", "snapshot"}, nil, io.LimitReader(archive, size), size)
	if err != nil {
		return err
	}
	return answered(res, nil)
}
