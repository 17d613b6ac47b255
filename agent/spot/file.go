package spot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// file takes a file for the notice: that it is there, or, where it holds a JSON object, what that says:
//
//	{"reason": "maintenance of rack 4", "at": "2030-01-02T15:04:05Z"}
//
// Without a time the machine goes fileNotice after the file was changed last.
type file struct{ Options }

const fileNotice = 2 * time.Minute

// Spot is true: a machine that somebody can announce the end of is one.
func (p *file) Spot(context.Context) (bool, error) { return true, nil }

func (p *file) Watch(ctx context.Context, report func(*Notice)) { p.watch(ctx, report, p.look) }

func (p *file) look(context.Context) (*Notice, error) {
	f, err := os.Open(p.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxAnswer))
	if err != nil {
		return nil, err
	}
	said := struct {
		Reason string
		At     time.Time
	}{"announced by " + p.Path, info.ModTime().Add(fileNotice)}
	if len(text) > 0 && text[0] == '{' {
		if err := json.Unmarshal(text, &said); err != nil {
			return nil, fmt.Errorf("%s: %w", p.Path, err)
		}
	}
	return &Notice{Reason: said.Reason, At: said.At}, nil
}
