package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/jobspec"
)

// The demonstration's files, below the project's folder.
const (
	demoModel  = "models/fashion/fashion.onnx"
	demoJob    = "jobs/examples/fashion.nomad.hcl"
	demoImages = "testdata/fashion/*.png"
	demoCount  = 10
)

// checkDemoFiles says early what the demonstration will miss.
func checkDemoFiles(dir string) error {
	for _, f := range []string{demoModel, demoJob} {
		if !fileExists(filepath.Join(dir, f)) {
			return fmt.Errorf("the demonstration needs %s: start it in the project's folder, or name that with --demo-dir", filepath.Join(dir, f))
		}
	}
	if len(demoFiles(dir)) == 0 {
		return fmt.Errorf("the demonstration needs images at %s: start it in the project's folder, or name that with --demo-dir", filepath.Join(dir, demoImages))
	}
	return nil
}

// demoFiles picks images evenly over all classes.
func demoFiles(dir string) []string {
	all, err := filepath.Glob(filepath.Join(dir, demoImages))
	if err != nil || len(all) == 0 {
		return nil
	}
	var out []string
	for i := range min(demoCount, len(all)) {
		out = append(out, all[i*len(all)/min(demoCount, len(all))])
	}
	return out
}

// sampleImage is the name of one image to try by hand.
func sampleImage(dir string) string {
	if files := demoFiles(dir); files != nil {
		return filepath.Base(files[0])
	}
	return "IMAGE.png"
}

// runDemo pushes the sample model, runs its job and classifies real images. All
// of it can be done again: what is there already stays.
func runDemo(ctx context.Context, cfg devConfig, started time.Time, out io.Writer) error {
	client, err := api.NewClient("http://"+cfg.http, "", nil)
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(cfg.demoDir, demoModel))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	v, err := client.Push(ctx, "fashion", api.About{Description: "Fashion-MNIST classifier, the sample model"}, f, info.Size(), newBar(out, "push fashion").set)
	if err != nil {
		return fmt.Errorf("push the model: %w", err)
	}
	fmt.Fprintf(out, "model fashion version %d, %s\n", v.Version, bytesText(v.Size))
	r, err := submit(ctx, client, filepath.Join(cfg.demoDir, demoJob), jobspec.ParseOptions{})
	if err != nil {
		return fmt.Errorf("submit the job: %w", err)
	}
	fmt.Fprintf(out, "job fashion submitted from %s\n", filepath.Join(cfg.demoDir, demoJob))
	if err := watchJob(ctx, client, r.EvalID, out); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			return errors.New("the job could not be placed; see above")
		}
		return err
	}
	results, err := classifyFiles(ctx, "http://"+cfg.gatewayAddr, "fashion", "", 1, demoFiles(cfg.demoDir))
	if err != nil {
		return err
	}
	fmt.Fprintln(out)
	if err := printClassified(out, results); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nfirst answers %.1f s after the start\n", time.Since(started).Seconds())
	return nil
}
