package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/gateway"
	"github.com/rxvision/rxvision/oip"
)

// maxInferFile bounds an image or tensor file that infer sends, in bytes.
const maxInferFile = 64 << 20

func newInfer() *cobra.Command {
	var (
		addr, tensors string
		topK          int
		asJSON        bool
	)
	cmd := &cobra.Command{
		Use:   "infer MODEL [IMAGE...]",
		Short: "Ask a model: classify images, or run it on tensors",
		Long: `Classifies image files (PNG, JPEG, WebP) by a model that says how to, or, with
--tensors FILE, sends an Open Inference Protocol request in JSON and prints the answer.
MODEL may be NAME, NAME@ALIAS or NAME:VERSION.`,
		Example: "  rxvision infer fashion testdata/fashion/*.png\n  rxvision infer fashion --tensors request.json",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			base := "http://" + cmp.Or(addr, defaultGatewayAddr)
			if strings.Contains(addr, "://") {
				base = strings.TrimSuffix(addr, "/")
			}
			model, version := splitModel(args[0])
			switch {
			case tensors != "" && len(args) > 1:
				return errors.New("give either images or --tensors, not both")
			case tensors != "":
				return inferTensors(cmd.Context(), base, model, version, tensors, cmd.OutOrStdout())
			case len(args) == 1:
				return errors.New("give image files, or --tensors FILE")
			}
			results, err := classifyFiles(cmd.Context(), base, model, version, topK, args[1:])
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), results), err)
			}
			return errors.Join(printClassified(cmd.OutOrStdout(), results), err)
		},
	}
	f := cmd.Flags()
	f.StringVar(&addr, "gateway", defaultGatewayAddr, "host:port or URL of a gateway")
	f.StringVar(&tensors, "tensors", "", "file with an inference request in JSON; - is standard input")
	f.IntVar(&topK, "top-k", 1, "classes to name for each image")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// splitModel takes NAME, NAME@ALIAS or NAME:VERSION apart.
func splitModel(ref string) (model, version string) {
	if i := strings.IndexAny(ref, "@:"); i >= 0 {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

// modelPath is the path of a model's call.
func modelPath(prefix, model, version, call string) string {
	p := prefix + "/models/" + url.PathEscape(model)
	if version != "" {
		p += "/versions/" + url.PathEscape(version)
	}
	return p + "/" + call
}

// classified is one image's answer.
type classified struct {
	Image     string
	LatencyMS float64
	gateway.Classification
}

// classifyFiles asks for each image in turn; the first fault ends it.
func classifyFiles(ctx context.Context, base, model, version string, topK int, files []string) ([]classified, error) {
	var out []classified
	for _, file := range files {
		body, err := readBounded(file)
		if err != nil {
			return out, err
		}
		began := time.Now()
		answer, err := post(ctx, fmt.Sprintf("%s%s?top_k=%d", base, modelPath("/v1", model, version, "classify"), topK), "application/octet-stream", body)
		if err != nil {
			return out, fmt.Errorf("%s: %w", file, err)
		}
		c := classified{Image: file, LatencyMS: float64(time.Since(began).Microseconds()) / 1000}
		if err := json.Unmarshal(answer, &c.Classification); err != nil {
			return out, fmt.Errorf("%s: the answer cannot be read: %w", file, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func printClassified(w io.Writer, results []classified) error {
	var rows [][]string
	for _, r := range results {
		for i, c := range r.Classes {
			name, took := r.Image, fmt.Sprintf("%.1f ms", r.LatencyMS)
			if i > 0 {
				name, took = "", ""
			}
			rows = append(rows, []string{name, c.Label, fmt.Sprintf("%.1f %%", 100*c.Probability), took})
		}
	}
	if rows == nil {
		return nil
	}
	return table(w, "IMAGE|LABEL|CONFIDENCE|LATENCY", rows)
}

func inferTensors(ctx context.Context, base, model, version, file string, out io.Writer) error {
	body, err := readBounded(file)
	if err != nil {
		return err
	}
	if _, err := oip.DecodeRequest(body, -1); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	answer, err := post(ctx, base+modelPath("/v2", model, version, "infer"), "application/json", body)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", bytes.TrimSpace(answer))
	return err
}

func readBounded(file string) ([]byte, error) {
	var r io.Reader = os.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxInferFile+1))
	if err == nil && len(b) > maxInferFile {
		err = fmt.Errorf("%s is larger than %s", file, bytesText(maxInferFile))
	}
	return b, err
}

// post sends a body and gives the answer of a 200; another status becomes an
// error with the server's reason.
func post(ctx context.Context, target, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	if token := os.Getenv("NOMAD_TOKEN"); token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("gateway %s cannot be reached; is it running? %w", req.URL.Host, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxInferFile))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var e oip.ErrorResponse
		if json.Unmarshal(answer, &e) == nil && e.Error != "" {
			return nil, errors.New(e.Error)
		}
		return nil, fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(answer))
	}
	return answer, nil
}
